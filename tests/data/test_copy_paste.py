"""Copy-paste: the official one against golden cases, the corrected one against slow loops, and both
in the loader.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
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


def sample_of(image, boxes, classes=None, masks=None, size=None) -> dict:
    """A mapped sample of (C, H, W) ``image``; masks are (N, H, W) or polygons."""
    image = torch.as_tensor(image)
    instances = Instances(tuple(image.shape[1:]))
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    count = len(instances.gt_boxes)
    instances.gt_classes = torch.as_tensor(range(count) if classes is None else classes)
    if isinstance(masks, list):
        instances.gt_masks = PolygonMasks(masks)
    elif masks is not None:
        instances.gt_masks = BitMasks(torch.as_tensor(np.asarray(masks)).bool())
    return {"image": image, "instances": instances}


def flat(value: int, height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def box_mask(box, height: int = 40, width: int = 60) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


# Official


def golden_cases(shared_data):
    path = shared_data.parent / "reference" / "golden" / "cednet" / "copy_paste.npz"
    if not path.is_file():
        pytest.skip(f"no golden cases of copy-paste in {path}")
    file = np.load(path)
    for number, case in enumerate(json.loads(str(file["meta"]))["cases"]):
        values = {k.partition("_")[2]: file[k] for k in file if k.startswith(f"case{number}_")}
        yield case, values


def golden_sample(values: dict, part: str) -> dict:
    image = np.ascontiguousarray(values[f"{part}_img"].transpose(2, 0, 1))
    boxes, labels = values[f"{part}_gt_bboxes"], values[f"{part}_gt_labels"]
    return sample_of(image, boxes, labels, values.get(f"{part}_masks"))


def test_golden_cases_are_matched_bit_by_bit(shared_data):
    paste = CopyPaste(prob=1.0)
    for case, values in golden_cases(shared_data):
        if not case["masks"]:
            values = {name: value for name, value in values.items() if "masks" not in name}
        np.random.seed(case["np_seed"])
        target, source = golden_sample(values, "tgt"), golden_sample(values, "src")
        assert paste.is_due(target)
        found, expected = paste(target, source), golden_sample(values, "out")
        assert torch.equal(found["image"], expected["image"])
        found, expected = found["instances"], expected["instances"]
        assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert torch.equal(found.gt_classes, expected.gt_classes)
        assert found.has("gt_masks") == expected.has("gt_masks") == case["masks"]
        if case["masks"]:
            assert torch.equal(found.gt_masks.tensor, expected.gt_masks.tensor)


def test_official_pastes_stay_inside_rectangles_and_change_no_input():
    target = sample_of(flat(10), [[0, 0, 12, 12]])
    source = sample_of(
        flat(200), [[20.7, 10.2, 35.9, 25.6], [1, 1, 12, 12], [52, 30, 60, 40]], [7, 8, 9]
    )
    before = target["image"].clone(), source["image"].clone()
    seen = set()
    for seed in range(60):
        np.random.seed(seed)
        found = CopyPaste(margin=4, max_objects=1)(target, source)
        assert len(found["instances"]) == 2
        category = int(found["instances"].gt_classes[1])
        seen.add(category)
        ys, xs = torch.nonzero(found["image"][0] == 200, as_tuple=True)
        edges = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        box = {7: [20, 10, 35, 25], 9: [52, 30, 59, 39]}[category]
        outside = np.array([-1, -1, 1, 1]) * (np.array(edges) - box)
        assert (outside >= 0).all()
        assert (outside <= 4).all()
    assert seen == {7, 9}  # the other one overlaps the target's too much
    assert torch.equal(target["image"], before[0])
    assert torch.equal(source["image"], before[1])
    assert len(target["instances"]) == 1


def test_overlap_is_measured_by_iou_and_objects_may_come_twice():
    target = sample_of(flat(0), [[0, 0, 20, 20]])
    # two boxes of 20x20, one moved to the right: the IoU is 0.2 at 13.33
    for offset, pasted in ((14.0, True), (13.4, True), (13.2, False), (5.0, False)):
        source = sample_of(flat(1), [[offset, 0, offset + 20, 20]])
        found = CopyPaste(max_iou=0.2)(target, source)
        assert (len(found["instances"]) == 2) == pasted, offset
    source = sample_of(flat(1), [[30, 0, 40, 10], [30, 20, 40, 30], [45, 20, 50, 30]])
    chosen = []
    for seed in range(30):
        np.random.seed(seed)
        chosen.append(tuple(CopyPaste()(target, source)["instances"].gt_classes[1:].tolist()))
        assert len(chosen[-1]) == 3
    assert any(len(set(each)) < 3 for each in chosen)


def test_probability_and_images_without_objects():
    full, empty = sample_of(flat(0), [[0, 0, 9, 9]]), sample_of(flat(0), [])
    np.random.seed(0)
    assert np.mean([CopyPaste(prob=0.3).is_due(full) for _ in range(2000)]) == pytest.approx(
        0.3, abs=0.04
    )
    assert not CopyPaste(prob=1.0).is_due(empty)
    paste = CopyPaste(prob=1.0)
    assert paste(full, empty) is full
    covering = sample_of(flat(3), [[0, 0, 9, 9]])
    assert paste(full, covering) is full


def test_label_maps_are_pasted_too():
    target, source = (
        sample_of(flat(v), b) for v, b in ((0, [[0, 0, 9, 9]]), (1, [[30, 9, 40, 19]]))
    )
    target["sem_seg"], source["sem_seg"] = (
        torch.zeros(40, 60, dtype=torch.int64),
        torch.ones(40, 60).long(),
    )
    found = CopyPaste()(target, source)
    assert torch.equal(found["sem_seg"], found["image"][0].long())
    assert found["sem_seg"].sum() >= 100


@pytest.mark.parametrize("corrected", [False, True])
def test_a_source_of_another_size_gives_what_lies_within_the_target(corrected):
    target = sample_of(flat(0), [[0, 0, 9, 9]], masks=box_mask((0, 0, 9, 9))[None])
    for height, width in ((30, 90), (80, 40), (90, 90)):
        boxes = [[20, 12, 30, 22], [55, 20, 80, 28], [10, 35, 20, 70]]
        inside = [b for b in boxes if b[2] <= width and b[3] <= height]
        masks = np.stack([box_mask(b, height, width) for b in inside])
        source = sample_of(flat(5, height, width), inside, masks=masks)
        np.random.seed(1)
        found = CopyPaste(corrected=corrected)(target, source)
        assert found["image"].shape == (3, 40, 60)
        assert set(found["instances"].gt_boxes.tensor[1:].unique(dim=0)[:, 0].tolist()) == {20.0}
        assert found["instances"].gt_masks.tensor.shape[1:] == (40, 60)
        assert found["instances"].gt_masks.tensor[1].sum() == 100
        assert (found["image"][:, 12:22, 20:30] == 5).all()


def polygon(box) -> list[np.ndarray]:
    x0, y0, x1, y1 = box
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


def test_polygons_stay_polygons_where_both_have_them():
    boxes = [(0, 0, 9, 9)], [(30, 9, 40, 19), (30, 25, 36, 33)]
    polygons = [sample_of(flat(0), b, masks=[polygon(each) for each in b]) for b in boxes]
    bits = [sample_of(flat(0), b, masks=np.stack([box_mask(each) for each in b])) for b in boxes]
    kinds = {}
    for name, pair in {
        "polygons": polygons,
        "bits": bits,
        "mixed": (polygons[0], bits[1]),
        "mixed again": (bits[0], polygons[1]),
    }.items():
        np.random.seed(0)
        found = CopyPaste()(*pair)["instances"]
        kinds[name] = type(found.gt_masks)
        drawn = found.gt_masks
        if isinstance(drawn, PolygonMasks):
            drawn = BitMasks.from_polygon_masks(drawn, 40, 60)
        expected = [box_mask([int(v) for v in box]) for box in found.gt_boxes.tensor]
        assert np.array_equal(drawn.tensor.numpy(), np.stack(expected))
    assert kinds.pop("polygons") is PolygonMasks
    assert set(kinds.values()) == {BitMasks}


# Corrected


def blobs(rng, count: int, height: int, width: int):
    """Ragged masks with tight boxes."""
    masks = []
    for _ in range(count):
        w, h = rng.integers(6, 25, 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        mask = np.zeros((height, width), bool)
        mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.7
        masks.append(mask)
    return np.stack(masks), np.array([tight(mask) for mask in masks], np.float32)


def tight(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("seed", range(8))
def test_corrected_masks_say_what_is_to_be_seen(seed):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 255, (3, 50, 70), dtype=np.uint8) for _ in "ab"]
    (old_masks, old_boxes), (new_masks, new_boxes) = (blobs(rng, n, 50, 70) for n in (6, 9))
    target = sample_of(images[0], old_boxes, range(6), old_masks)
    source = sample_of(images[1], new_boxes, range(10, 19), new_masks)
    np.random.seed(seed)
    paste = CopyPaste(corrected=True, max_iou=0.3, min_visible=0.6)
    found = paste(target, source)
    classes = found["instances"].gt_classes.tolist()
    pasted = [c - 10 for c in classes if c >= 10]
    assert 1 <= len(pasted) <= 7
    assert len(set(pasted)) == len(pasted)
    covered = new_masks[pasted].any(axis=0)
    assert np.array_equal(found["image"].numpy(), np.where(covered, images[1], images[0]))
    rows = zip(
        classes, found["instances"].gt_masks.tensor.numpy(), found["instances"].gt_boxes.tensor
    )
    kept = []
    for category, mask, box in rows:
        if category >= 10:
            assert np.array_equal(mask, new_masks[category - 10])
        else:
            kept.append(category)
            assert np.array_equal(mask, old_masks[category] & ~covered)
        assert box.tolist() == tight(mask)
    shares = [(mask & ~covered).sum() / mask.sum() for mask in old_masks]
    assert kept == [index for index, share in enumerate(shares) if share >= 0.6]
    assert np.array_equal(target["instances"].gt_masks.tensor.numpy(), old_masks)


def test_corrected_boxes_shrink_to_what_is_to_be_seen():
    # the source's only object covers columns 20 to 39 of rows 10 to 29
    source = sample_of(flat(9), [[20, 10, 40, 30]], [5])
    cases = {
        (2.5, 12.25, 23.5, 27.75): (2.5, 12.25, 20, 27.75),  # its right end
        (37.5, 5.5, 58.25, 33.5): (37.5, 5.5, 58.25, 33.5),  # a corner of it sticks out all around
        (21.5, 2.5, 38.5, 13): (21.5, 2.5, 38.5, 10),  # its lower end
        (25, 12, 39, 28): None,  # all of it
        (22, 22, 42, 28): None,  # nine tenths
        (45, 1, 55, 9): (45, 1, 55, 9),
    }
    target = sample_of(flat(0), list(cases))
    paste = CopyPaste(corrected=True, max_iou=1.0, margin=0, min_visible=0.2)
    found = paste(target, source)["instances"]
    expected = [index for index, box in enumerate(cases.values()) if box is not None]
    assert found.gt_classes.tolist() == [*expected, 5]
    boxes = [box for box in cases.values() if box is not None]
    assert found.gt_boxes.tensor[:-1].tolist() == [list(box) for box in boxes]


def test_corrected_polygons_become_bit_masks_that_are_cut():
    target = sample_of(flat(0), [[0, 0, 30, 20]], masks=[polygon((0, 0, 30, 20))])
    source = sample_of(flat(1), [[20, 0, 50, 8]], [3], masks=[polygon((20, 0, 50, 8))])
    found = CopyPaste(corrected=True)(target, source)
    expected = box_mask((0, 0, 30, 20)) & ~box_mask((20, 0, 50, 8))
    assert np.array_equal(found["instances"].gt_masks.tensor[0].numpy(), expected)
    assert found["instances"].gt_boxes.tensor[0].tolist() == [
        0,
        0,
        30,
        20,
    ]  # an L reaches all sides
    assert np.array_equal(found["image"][0].bool().numpy(), box_mask((20, 0, 50, 8)))


def test_polygons_are_drawn_as_detectron2_draws_them():
    """Ragged ones, of several parts, with corners on the borders of pixels and of the image."""
    rng = np.random.default_rng(0)
    polygons = []
    for number in range(60):
        parts = []
        for _ in range(rng.integers(1, 3)):
            centre, reach = rng.uniform(0, (60, 40)), rng.uniform(0.3, 25, 2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
            corners = centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            corners = np.clip(corners, 0, (60, 40))
            parts.append((np.round(corners * 2) / 2 if number % 2 else corners).reshape(-1))
        polygons.append(parts)
    expected = BitMasks.from_polygon_masks(PolygonMasks(polygons), 40, 60).tensor
    keep = expected.any(dim=2).any(dim=1)
    boxes = BitMasks(expected).get_bounding_boxes().tensor[keep]
    target = sample_of(
        flat(0), boxes, masks=[p for p, kept in zip(polygons, keep.tolist()) if kept]
    )
    corner = (59, 39, 60, 40)
    source = sample_of(flat(1), [corner], masks=[polygon(corner)])
    paste = CopyPaste(corrected=True, max_iou=1.0, min_visible=0.0)
    found = paste(target, source)["instances"].gt_masks.tensor
    uncovered = torch.from_numpy(~box_mask(corner))
    kept = [mask & uncovered for mask in expected[keep] if (mask & uncovered).any()]
    assert torch.equal(found[:-1], torch.stack(kept))


# In the loader


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
