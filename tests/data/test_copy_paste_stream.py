"""Copy-paste in the loader: which partners, the same stream for any workers, rejected images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from PIL import Image

from d2dense.config import common, get_cfg
from d2dense.data import augmentations, loaders
from d2dense.data.copy_paste import CopyPaste, build_copy_paste
from d2dense.data.datasets import register_custom
from d2dense.data.loaders import build_train_loader
from d2dense.data.mappers import DetectionMapper, SemanticMapper
from d2dense.data.reading import RejectedSample
from d2dense.errors import UserError
from tools import visualize_data

LOGGER = "d2dense.data.samples"


def polygon(box) -> list[np.ndarray]:
    x0, y0, x1, y1 = box
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


@pytest.fixture
def records(tmp_path) -> list[dict]:
    """Ten flat images whose grey value is 20 times the number; objects share no place."""
    found = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((40, 60, 3), 20 * number, np.uint8)).save(path)
        x, y = 2 + 11 * (number % 5), 4 + 18 * (number // 5)
        box = [x, y, x + 10, y + 14]
        entry = {"bbox": box, "bbox_mode": 0, "category_id": number, "iscrowd": 0}
        entry["segmentation"] = [polygon(box)[0].tolist()]
        record = {"file_name": str(path), "image_id": number, "width": 60, "height": 40}
        found.append(record | {"annotations": [entry]})
    return found


def mapper(*steps, **options) -> DetectionMapper:
    return DetectionMapper(is_train=True, augmentations=steps, **options)


def loader(records, **options):
    options = {"mapper": mapper(), "copy_paste": CopyPaste(prob=1.0, margin=0)} | options
    options = {"total_batch_size": 2, "num_workers": 0, "seed": 3} | options
    return build_train_loader(dataset=records, **options)


def take(batches, count: int) -> list[dict]:
    return list(itertools.chain.from_iterable(itertools.islice(batches, count)))


def same(first: list[dict], second: list[dict]) -> bool:
    return all(
        a["image_id"] == b["image_id"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        and torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        for a, b in zip(first, second, strict=True)
    )


def partners(samples: list[dict]) -> list[tuple[int, int]]:
    """The image and the one that it was given an object of."""
    found = []
    for sample in samples:
        own, *pasted = sample["instances"].gt_classes.tolist()
        assert own == sample["image_id"]
        assert len(pasted) == 1
        x0, y0, x1, y1 = (int(v) for v in sample["instances"].gt_boxes.tensor[1])
        assert (sample["image"][:, y0:y1, x0:x1] == 20 * pasted[0]).all()
        found.append((own, pasted[0]))
    return found


def test_partners_are_drawn_evenly_from_all_others(records):
    pairs = partners(take(loader(records), 1000))
    assert all(own != other for own, other in pairs)
    counts = np.bincount([own * 10 + other for own, other in pairs], minlength=100).reshape(10, 10)
    others = counts[~np.eye(10, dtype=bool)]
    expected = len(pairs) / 90
    # chi-square with 89 degrees of freedom: below 150 but for one in ten thousand
    assert ((others - expected) ** 2 / expected).sum() < 150


def test_the_stream_does_not_depend_on_workers_or_resuming(records):
    steps = augmentations.lsj(image_size=48, min_scale=0.5, max_scale=1.5)
    options = {
        "mapper": mapper(*steps, use_instance_mask=True, recompute_boxes=True),
        "copy_paste": CopyPaste(prob=0.5, corrected=True),
    }
    whole = take(loader(records, **options), 20)
    assert {len(sample["instances"]) > 1 for sample in whole} == {True, False}
    for workers in (1, 2):
        assert same(whole, take(loader(records, num_workers=workers, **options), 20))
    assert same(whole[14:], take(loader(records, start_batch=7, **options), 13))
    assert not same(whole, take(loader(records, seed=4, **options), 20))


def test_images_without_a_paste_are_as_without_copy_paste(records):
    steps = augmentations.lsj(image_size=48, min_scale=0.5, max_scale=1.5)
    plain = take(loader(records, mapper=mapper(*steps), copy_paste=None), 30)
    mixed = take(loader(records, mapper=mapper(*steps), copy_paste=CopyPaste(prob=0.5)), 30)
    unchanged = [same([a], [b]) for a, b in zip(plain, mixed)]
    assert 15 < sum(unchanged) < 45
    assert [a["image_id"] for a in plain] == [b["image_id"] for b in mixed]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_partner_is_logged_and_another_one_drawn(records, caplog, workers):
    with open(records[4]["file_name"], "wb"):
        pass
    first = loader(records, max_bad_share=0.5, num_workers=workers)
    pairs = partners(take(first, 60))
    assert 4 not in itertools.chain(*pairs)
    warned = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert len(warned) == 1
    assert "4.png" in warned[0]
    counts = first.bad_samples
    # two images are read per sample, and a tenth of them is bad
    assert counts.drawn == counts.bad + 240
    assert counts.bad / counts.drawn == pytest.approx(0.1, abs=0.06)
    assert pairs == partners(take(loader(records, max_bad_share=0.5), 60))


def test_without_a_usable_partner_the_image_comes_alone_and_the_share_ends_the_run(records):
    for record in records[1:]:
        with open(record["file_name"], "wb"):
            pass
    samples = take(loader(records, max_bad_share=1.0), 2)
    assert {sample["image_id"] for sample in samples} == {0}
    assert all(len(sample["instances"]) == 1 for sample in samples)
    with pytest.raises(UserError, match="cannot be used"):
        take(loader(records, max_bad_share=0.5), 2)


def test_a_single_image_is_left_alone(records):
    for sample in take(loader(records[:1]), 3):
        assert sample["instances"].gt_classes.tolist() == [0]


# Rejected images


def thin(number: int, records: list[dict], side: float) -> None:
    records[number]["annotations"][0]["bbox"] = [5, 5, 5 + side, 20]


def test_an_image_that_loses_all_boxes_is_replaced_but_not_bad(records, caplog):
    thin(4, records, 0.009)
    strict = mapper(min_box_side=0.01, reject_emptied=True)
    with pytest.raises(RejectedSample, match=r"4\.png .*0\.01 pixels; lower INPUT\.MIN_BOX_SIDE"):
        strict(records[4])
    found = loader(records, mapper=strict, copy_paste=None, max_bad_share=0.0)
    samples = take(found, 30)
    assert 4 not in [sample["image_id"] for sample in samples]
    assert found.bad_samples.bad == 0
    assert not [r for r in caplog.records if r.name == LOGGER]
    again = loader(records, mapper=strict, copy_paste=None, num_workers=2)
    assert same(samples, take(again, 30))
    # as the second image it leaves the first one as it is
    mixed = take(loader(records, mapper=strict), 60)
    alone = sum(len(sample["instances"]) == 1 for sample in mixed)
    assert 4 < alone < 30
    assert 4 not in [c for s in mixed for c in s["instances"].gt_classes.tolist()]


def test_only_the_limit_on_sides_rejects(records):
    options = {"min_box_side": 0.01, "reject_emptied": True}
    records[3]["annotations"] = []
    assert len(mapper(**options)(records[3])["instances"]) == 0
    # the crop leaves nothing in view
    cut = augmentations.T.CropTransform(0, 20, 60, 20)
    assert len(mapper(cut, **options)(records[2])["instances"]) == 0
    thin(5, records, 0.02)
    assert len(mapper(**options)(records[5])["instances"]) == 1
    thin(5, records, 0.009)
    assert len(mapper()(records[5])["instances"]) == 1
    assert len(mapper(min_box_side=0.01)(records[5])["instances"]) == 0
    # the mask is what is in view: a box beside its mask
    mask = [polygon((40, 0, 50, 10))[0].tolist()]
    records[6]["annotations"][0] |= {"bbox": [0, 20, 60, 40], "segmentation": mask}
    options |= {"use_instance_mask": True, "recompute_boxes": True}
    with pytest.raises(RejectedSample):
        mapper(cut, **options)(records[6])
    assert len(mapper(**options)(records[6])["instances"]) == 1


def test_nothing_but_rejected_images_is_one_line(records):
    strict = mapper(min_box_side=100.0, reject_emptied=True)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"sides of more than 100\.0 pixels") as caught:
            take(loader(records, mapper=strict, num_workers=workers), 1)
        assert "\n" not in str(caught.value)


# The recipe


def test_the_official_jitter(records):
    """Whole pixels of the scaled side, half up; crops at a uniform offset; padding below."""
    record = records[9] | {"annotations": []}
    steps = augmentations.lsj(image_size=100, flip="none", pad_value=(1, 2, 3))
    sides = []
    for seed in range(200):
        np.random.seed(seed)
        image = mapper(*steps)(record)["image"]
        assert image.shape == (3, 100, 100)
        inside = (image == 180).all(dim=0)
        width, height = int(inside.any(dim=0).sum()), int(inside.any(dim=1).sum())
        np.random.seed(seed)
        target = int(100 * np.random.uniform(0.1, 2.0))
        expected = [min(100, int(length * target / 60 + 0.5)) for length in (60, 40)]
        assert [width, height] == expected
        assert inside[:height, :width].all()
        sides.append(target)
        for channel, value in enumerate((1, 2, 3)):
            assert (image[channel][~inside] == value).all()
    assert min(sides) < 20
    assert max(sides) > 190


def test_padding_needs_a_value_or_one_per_channel(records):
    steps = augmentations.lsj(image_size=300, max_scale=0.5, pad_value=(1, 2))
    with pytest.raises(UserError, match=r"INPUT\.LSJ\.PAD_VALUE .*3 channels"):
        augmentations.T.AugmentationList(steps)(
            augmentations.T.AugInput(np.zeros((9, 9, 3), np.uint8))
        )
    grey = augmentations.lsj(image_size=30, max_scale=0.5, pad_value=[7])
    inputs = augmentations.T.AugInput(np.zeros((9, 9, 1), np.uint8))
    augmentations.T.AugmentationList(grey)(inputs)
    assert inputs.image.shape == (30, 30, 1)
    assert inputs.image[-1, -1] == 7


# Configs, pictures


@pytest.mark.parametrize("corrected", [False, True])
def test_both_kinds_of_config_paste_the_same(tiny, corrected):
    name = register_custom({"train": {"json": tiny.json, "images": tiny.images}})["train"]
    node = common.detection_loader(
        train=name,
        train_augmentations=L(augmentations.lsj)(image_size=48, pad_value=[9, 8, 7]),
        masks=True,
        recompute_boxes=True,
        min_box_side=0.01,
        reject_emptied=True,
        copy_paste=L(CopyPaste)(prob=0.8, max_iou=0.9, corrected=corrected),
        batch_size=2,
        workers=0,
    )
    node.train.seed = 4
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = (name,), 4, 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MAPPER, cfg.MODEL.MASK_ON = "lsj", True
    cfg.INPUT.LSJ.IMAGE_SIZE, cfg.INPUT.LSJ.PAD_VALUE = 48, (9.0, 8.0, 7.0)
    cfg.INPUT.RECOMPUTE_BOXES, cfg.INPUT.MIN_BOX_SIDE, cfg.INPUT.REJECT_EMPTIED = True, 0.01, True
    keys = {"ENABLED": True, "PROB": 0.8, "MAX_IOU": 0.9, "CORRECTED": corrected}
    cfg.merge_from_list([v for k, x in keys.items() for v in (f"INPUT.COPY_PASTE.{k}", x)])
    lazy, yaml = take(instantiate(node.train), 10), take(loaders.train_from_cfg(cfg), 10)
    assert same(lazy, yaml)
    cfg.INPUT.COPY_PASTE.ENABLED = False
    assert not same(lazy, take(loaders.train_from_cfg(cfg), 10))


def test_defaults_are_the_same_everywhere():
    cfg = get_cfg()
    assert build_copy_paste(cfg) is None
    cfg.INPUT.COPY_PASTE.ENABLED = True
    assert vars(build_copy_paste(cfg)) == vars(CopyPaste())


def test_mistakes_are_one_line(records):
    for key, value in (("prob", 1.5), ("max_iou", -0.1), ("margin", -1), ("min_visible", 2)):
        words = (
            rf"INPUT\.COPY_PASTE\.{key.upper()} / dataloader\.train\.copy_paste\.{key} = {value}"
        )
        with pytest.raises(UserError, match=words):
            CopyPaste(**{key: value})
    with pytest.raises(UserError, match=r"needs a mapper with objects.*COPY_PASTE\.ENABLED"):
        loader(records, mapper=SemanticMapper(is_train=True, augmentations=[]))


def test_pictures_show_what_was_pasted(tiny, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"DATASETS:\n  CUSTOM:\n    TRAIN: {{JSON: {tiny.json}, IMAGES: {tiny.images}}}\n"
        "  CLASS_COUNT: auto\n"
        "DATALOADER:\n  NUM_WORKERS: 0\n"
        "SEED: 1\n"
        "INPUT:\n  MAPPER: lsj\n  LSJ: {IMAGE_SIZE: 96, MIN_SCALE: 1.0}\n"
        "  COPY_PASTE: {ENABLED: true, PROB: 1.0, MAX_IOU: 1.0}\n"
    )
    out = tmp_path / "pictures"
    arguments = ["--config-file", str(config), "--num", "4", "--output", str(out)]
    assert visualize_data.main(arguments) == 0
    plain = tmp_path / "plain"
    arguments = ["--config-file", str(config), "--num", "4", "--output", str(plain)]
    assert visualize_data.main([*arguments, "INPUT.COPY_PASTE.ENABLED", "False"]) == 0
    pairs = [
        (np.asarray(Image.open(p)), np.asarray(Image.open(plain / p.name))) for p in out.iterdir()
    ]
    assert len(pairs) == 4
    assert any((a != b).any() for a, b in pairs)
