"""Loaders: the same stream for the same seed, whoever reads it."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.utils import comm

from d2dense.config import get_cfg
from d2dense.data import augmentations, loaders
from d2dense.data.datasets import register_custom
from d2dense.data.loaders import build_test_loader, build_train_loader, get_dataset_dicts
from d2dense.data.mappers import DetectionMapper
from d2dense.data.reading import SampleError
from d2dense.errors import UserError


@pytest.fixture
def name(tiny) -> str:
    entries = {"json": tiny.json, "images": tiny.images}
    return register_custom({"train": entries})["train"]


def train_mapper() -> DetectionMapper:
    steps = augmentations.lsj(image_size=48, min_scale=0.5, max_scale=1.5)
    return DetectionMapper(is_train=True, augmentations=steps, use_instance_mask=True)


def train_loader(dataset, **options):
    options = {"total_batch_size": 2, "num_workers": 0, "seed": 3} | options
    return build_train_loader(dataset=dataset, mapper=train_mapper(), **options)


def take(loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(loader, count))


def signature(batches) -> list[list[tuple]]:
    def numbers(sample: dict) -> tuple:
        boxes = sample["instances"].gt_boxes.tensor
        return sample["image_id"], sample["image"].sum().item(), boxes.sum().item()

    return [[numbers(sample) for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [True, False])
def test_the_stream_does_not_depend_on_the_workers(name, grouping):
    options = {"aspect_ratio_grouping": grouping}
    expected = take(train_loader(name, **options), 7)
    for workers in (1, 2):
        got = take(train_loader(name, num_workers=workers, **options), 7)
        for a, b in zip(itertools.chain(*expected), itertools.chain(*got)):
            assert a["image_id"] == b["image_id"]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_another_seed_is_another_stream_and_positions_differ(name):
    first, second = (signature(take(train_loader(name, seed=s), 6)) for s in (0, 1))
    assert first != second
    images = {}
    for sample in itertools.chain(*first):
        images.setdefault(sample[0], set()).add(sample[1])
    # the same image is augmented anew each time it comes
    assert all(len(sums) > 1 for sums in images.values())


def test_no_seed_draws_one(name):
    streams = [signature(take(train_loader(name, seed=s), 4)) for s in (None, -1, None)]
    assert len({str(stream) for stream in streams}) == 3


def test_skipping_continues_the_stream_without_reading(name):
    whole = signature(take(train_loader(name), 9))
    assert signature(take(train_loader(name, start_batch=5), 4)) == whole[5:]
    records = get_dataset_dicts(names=name)

    def mapper(record):
        calls.append(record["image_id"])
        return record

    calls: list[int] = []
    loader = build_train_loader(
        dataset=records, mapper=mapper, total_batch_size=2, num_workers=0, seed=3, start_batch=50
    )
    take(loader, 1)
    assert len(calls) == 2


def test_the_callers_random_numbers_are_left_alone(name):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    loader = iter(train_loader(name))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    next(loader)
    next(loader)
    assert draw()[:2] == expected[:2]


def test_batches_hold_images_of_one_orientation(name):
    for batch in take(train_loader(name), 12):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1
    mixed = take(train_loader(name, aspect_ratio_grouping=False), 12)
    assert any(len({s["width"] > s["height"] for s in batch}) == 2 for batch in mixed)


def test_an_epoch_holds_every_image_once(name):
    loader = train_loader(name, aspect_ratio_grouping=False, total_batch_size=3)
    ids = [s["image_id"] for batch in take(loader, 4) for s in batch]
    for epoch in range(4):
        assert sorted(ids[3 * epoch : 3 * epoch + 3]) == [10, 11, 12]


def test_processes_share_one_stream(name, monkeypatch):
    alone = signature(take(train_loader(name, aspect_ratio_grouping=False, total_batch_size=4), 5))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = train_loader(name, aspect_ratio_grouping=False, total_batch_size=4)
        shares.append(signature(take(loader, 5)))
    for step, batch in enumerate(alone):
        assert [len(share[step]) for share in shares] == [2, 2]
        assert sorted(shares[0][step] + shares[1][step]) == sorted(batch)


def test_a_batch_that_cannot_be_shared_is_an_error(name, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"batch size 3 .* 2 processes; change SOLVER"):
        train_loader(name, total_batch_size=3)


def test_rare_classes_come_more_often():
    # class 1 is in one image of sixteen: with threshold 0.25 it repeats sqrt(0.25 / (1 / 16)) = 2
    records = [
        {"file_name": "", "image_id": i, "annotations": [{"category_id": int(i == 5)}]}
        for i in range(16)
    ]
    loader = build_train_loader(
        dataset=records,
        mapper=dict,
        total_batch_size=17,
        num_workers=0,
        seed=0,
        sampler="repeat_factor",
        repeat_threshold=0.25,
    )
    for batch in take(loader, 3):
        counts = Counter(record["image_id"] for record in batch)
        assert counts == {i: 2 if i == 5 else 1 for i in range(16)}
    with pytest.raises(UserError, match="sampler = 'rfs'"):
        build_train_loader(dataset=records, mapper=dict, total_batch_size=1, sampler="rfs")
    with pytest.raises(UserError, match="needs a dataset with objects"):
        build_train_loader(
            dataset=[{"file_name": "x"}], mapper=dict, total_batch_size=1, sampler="repeat_factor"
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_that_names_it(name, tiny, workers):
    with open(f"{tiny.images}/2.png", "wb") as file:
        file.write(b"\x89PNG broken")
    with pytest.raises(SampleError) as caught:
        take(train_loader(name, num_workers=workers), 10)
    assert "2.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.file_name.endswith("2.png")


def test_evaluation_reads_everything_once_in_order(name, monkeypatch):
    mapper = DetectionMapper(
        is_train=False, augmentations=augmentations.default(is_train=False, min_size=20)
    )
    loader = build_test_loader(dataset=name, mapper=mapper, batch_size=3, num_workers=2)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 1]
    assert len(loader) == 2
    assert [s["image_id"] for batch in batches for s in batch] == [10, 11, 12, 13]
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_test_loader(dataset=name, mapper=mapper, num_workers=0)
        seen += [s["image_id"] for batch in loader for s in batch]
    assert seen == [10, 11, 12, 13]


def test_images_without_objects_can_be_kept(name, tiny, caplog):
    tiny.content["annotations"][3]["iscrowd"] = 1  # image 12 has a crowd only, image 13 nothing
    tiny.write()
    assert [r["image_id"] for r in get_dataset_dicts(names=name)] == [10, 11]
    kept = get_dataset_dicts(names=[name, name], filter_empty=False)
    assert [r["image_id"] for r in kept] == [10, 11, 12, 13] * 2
    loader = train_loader(kept, aspect_ratio_grouping=False)
    samples = [s for batch in take(loader, 4) for s in batch]
    assert {len(s["instances"]) > 0 for s in samples} == {True, False}
    tiny.content["annotations"] = []
    tiny.write()
    with pytest.raises(UserError, match="every image is without objects"):
        get_dataset_dicts(names=name)
    with pytest.raises(UserError, match="no dataset is named"):
        get_dataset_dicts(names=[])


def test_semantic_sets_have_no_sizes_and_still_load(tiny_semantic):
    name = register_custom(
        {
            "train": {
                "images": tiny_semantic.images,
                "labels": tiny_semantic.labels,
                "classes": tiny_semantic.classes,
                "label_suffix": "_label.png",
                "ignore_label": 9,
            }
        }
    )["train"]
    cfg = get_cfg()
    cfg.INPUT.MAPPER, cfg.INPUT.MIN_SIZE_TRAIN = "semantic", (40,)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [16, 24]
    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = (name,), 2, 5
    cfg.DATALOADER.NUM_WORKERS = 0
    for batch in take(loaders.train_from_cfg(cfg), 3):
        for sample in batch:
            assert sample["image"].shape == (3, 16, 24)
            assert set(sample["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
    test = list(loaders.test_from_cfg(cfg, name))
    assert [len(batch) for batch in test] == [1, 1, 1]
    assert test[0][0]["height"] == 40


def test_yaml_keys_reach_the_loader(name, monkeypatch):
    seen = {}
    monkeypatch.setattr(loaders, "build_train_loader", lambda **kwargs: seen.update(kwargs))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = (name,), 6, 11
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ASPECT_RATIO_GROUPING = 1, False
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.1
    cfg.DATALOADER.MAX_BAD_SHARE = 0.25
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    loaders.train_from_cfg(cfg, start_batch=4)
    assert len(seen.pop("dataset")) == 4
    assert seen.pop("mapper").is_train
    assert seen == {
        "total_batch_size": 6,
        "num_workers": 1,
        "seed": 11,
        "aspect_ratio_grouping": False,
        "sampler": "repeat_factor",
        "repeat_threshold": 0.1,
        "copy_paste": None,
        "max_bad_share": 0.25,
        "start_batch": 4,
    }
    cfg.DATALOADER.SAMPLER_TRAIN = "Other"
    with pytest.raises(UserError, match="SAMPLER_TRAIN = 'Other'"):
        loaders.train_from_cfg(cfg)


def test_real_images_with_every_recipe(shared_data):
    root = shared_data / "coco_mini"
    name = register_custom(
        {
            "train": {
                "json": str(root / "annotations/instances_train.json"),
                "images": str(root / "images/train"),
            }
        }
    )["train"]
    recipes = (
        augmentations.default(is_train=True, min_size=(160, 200)),
        augmentations.detr(min_size=(160,), crop_min_sizes=(160,), crop_range=(80, 120)),
        augmentations.lsj(image_size=192),
    )
    for steps in recipes:
        mapper = DetectionMapper(
            is_train=True, augmentations=steps, use_instance_mask=True, recompute_boxes=True
        )
        loader = build_train_loader(
            dataset=name, mapper=mapper, total_batch_size=4, num_workers=0, seed=0
        )
        objects = 0
        for sample in itertools.chain(*take(loader, 6)):
            instances, (height, width) = sample["instances"], sample["image"].shape[1:]
            assert instances.image_size == (height, width)
            assert len(instances.gt_masks) == len(instances)
            limit = torch.tensor([width, height, width, height])
            boxes = instances.gt_boxes.tensor
            assert ((boxes >= 0) & (boxes <= limit + 1e-4)).all()
            assert instances.gt_boxes.nonempty().all()
            objects += len(instances)
        assert objects > 30


@pytest.mark.parametrize("recipe", ["default", "detr", "lsj"])
def test_both_kinds_of_config_feed_the_same_samples(name, recipe):
    from d2dense.config import common

    options = {
        "default": {"min_size": [40, 56], "max_size": 100},
        "detr": {"min_size": [40, 56], "crop_min_sizes": [50], "crop_range": [20, 40]},
        "lsj": {"image_size": 64, "min_scale": 0.5},
    }[recipe]
    node = common.detection_loader(
        train=name,
        test=name,
        train_augmentations=L(getattr(augmentations, recipe))(is_train=True, **options),
        masks=True,
        batch_size=2,
        workers=0,
    )
    node.train.seed = 4
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = (name,), 4, 2
    cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.MASK_ON, cfg.INPUT.MAPPER = 0, True, recipe
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 56)
    cfg.INPUT.MAX_SIZE_TRAIN = 100 if recipe == "default" else 1333
    cfg.INPUT.DETR.CROP_MIN_SIZES, cfg.INPUT.DETR.CROP_RANGE = (50,), (20, 40)
    cfg.INPUT.LSJ.IMAGE_SIZE, cfg.INPUT.LSJ.MIN_SCALE = 64, 0.5
    lazy, yaml = take(instantiate(node.train), 5), take(loaders.train_from_cfg(cfg), 5)
    for a, b in zip(itertools.chain(*lazy), itertools.chain(*yaml)):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert a["instances"].has("gt_masks")
        assert b["instances"].has("gt_masks")


def test_both_kinds_of_config_feed_the_same_label_maps(tiny_semantic):
    from d2dense.config import common

    entries = {
        "images": tiny_semantic.images,
        "labels": tiny_semantic.labels,
        "classes": tiny_semantic.classes,
        "label_suffix": "_label.png",
        "ignore_label": 9,
    }
    name = register_custom({"train": entries})["train"]
    options = {"min_size": [40, 60], "crop_size": [24, 32], "single_category_max_area": 0.8}
    node = common.semantic_loader(
        train=name,
        test=name,
        train_augmentations=L(augmentations.semantic)(is_train=True, **options),
        test_augmentations=L(augmentations.semantic)(is_train=False, min_size=20),
        batch_size=2,
        workers=0,
    )
    node.train.seed = 4
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = (name,), 4, 2
    cfg.DATALOADER.NUM_WORKERS, cfg.INPUT.MAPPER = 0, "semantic"
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40, 60), 2048
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [24, 32]
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.8
    lazy, yaml = take(instantiate(node.train), 5), take(loaders.train_from_cfg(cfg), 5)
    for a, b in zip(itertools.chain(*lazy), itertools.chain(*yaml)):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["sem_seg"], b["sem_seg"])
    (first, *_), *_ = instantiate(node.test)
    assert first["image"].shape == (3, 20, 30)
