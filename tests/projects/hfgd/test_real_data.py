"""Real pictures by overrides alone: the recipes' data; the small model trained and evaluated."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from d2dense import config, model_zoo
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError
from d2dense.evaluation.loop import evaluate

KINDS = ("yaml", "lazy")


def entries(shared_data, which, split):
    if which == "camvid":
        root = shared_data / "camvid_mini"
        folders = {"images": root / "images" / split, "labels": root / "labels" / split}
        return folders | {"classes": root / "classes.json"}  # which says what is ignored
    if which == "cityscapes":
        root = shared_data / "cityscapes_mini"
        folders = {"images": root / "leftImg8bit" / split, "labels": root / "gtFine" / split}
        return folders | {"kind": "cityscapes", "task": "semantic"}
    root = shared_data / "ade20k_mini" / "ADEChallengeData2016"
    folders = {name: root / name / "validation" for name in ("images", "annotations")}
    return {"images": folders["images"], "labels": folders["annotations"], "label_table": "ade20k"}


def load(shared_data, which, kind, name, changes=()):
    """Return the run of a config on real data, with batches of two.

    ``changes`` are (yacs key, lazy key, value).
    """
    fixed = [
        ("DATASETS.CLASS_COUNT", "train.class_count", "auto"),
        ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size", 2),
        ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers", 0),
        ("DATALOADER.NUM_WORKERS", "dataloader.test.num_workers", 0),
        ("SEED", "train.seed", 1),
    ]
    overrides = []
    for slot in ("train", "val"):
        for key, value in entries(shared_data, which, slot).items():
            if kind == "yaml":
                overrides += [f"DATASETS.CUSTOM.{slot.upper()}.{key.upper()}", str(value)]
            else:
                overrides.append(f"datasets.{slot}.{key}={value}")
    for yaml, lazy, value in [*fixed, *changes]:
        overrides += [yaml, str(value)] if kind == "yaml" else [f"{lazy}={value}"]
    path = model_zoo.get_config_file(f"HFGD/{name}", kind)
    return experiment(config.load(path, overrides), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("which", "classes"), [("camvid", 11), ("cityscapes", 19), ("ade20k", 150)]
)
def test_the_data_of_a_recipe(shared_data, which, classes, kind):
    run = load(shared_data, which, kind, "hfgd_convnext_l_os4_pascal_context")
    batch = next(iter(run.build_train_loader()))
    assert len(batch) == 2
    for sample in batch:
        assert sample["image"].shape == (3, 512, 512)
        assert sample["image"].dtype == torch.float32
        assert 0 <= sample["image"].min() < sample["image"].max() <= 256
        assert sample["sem_seg"].shape == (512, 512)
        found = set(sample["sem_seg"].unique().tolist())
        assert found <= {*range(classes), 255}
        assert len(found) > 3
        # padding is 127.5 in all channels, and only there no class is certain
        filled = (sample["image"] == 127.5).all(0)
        assert (sample["sem_seg"][filled] == 255).all()
    test = next(iter(run.build_test_loader(run.test_names[0])))[0]
    assert test["image"].shape[1:] == (test["height"], test["width"])


@pytest.mark.parametrize(
    ("which", "classes", "kind"), [("camvid", 11, "lazy"), ("cityscapes", 19, "yaml")]
)
def test_training_and_evaluation(shared_data, tmp_path, which, classes, kind):
    changes = [
        ("TEST.SEM_SEG.BOUNDARY_IOU", "dataloader.evaluator.boundary_iou", True),
        ("TEST.SEM_SEG.SUBMISSION", "dataloader.evaluator.submission", True),
        ("TEST.SEM_SEG.MULTI_SCALE", "model.inference.multi_scale", True),
        ("TEST.SEM_SEG.RATIOS", "model.inference.ratios", "[0.5,1.0]"),
        ("TEST.SEM_SEG.PAD_STEP", "model.inference.pad_step", 32),
    ]
    run = load(shared_data, which, kind, "hfgd_tiny_shapes", changes)
    model = run.build_model().train()
    assert model.sem_seg_head.num_classes == classes
    losses = model(next(iter(run.build_train_loader())))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    name = run.test_names[0]
    evaluator = run.build_evaluator(name, str(tmp_path))
    images = [batch for _, batch in zip(range(2), run.build_test_loader(name))]
    scores = evaluate(model, {name: images}, {name: evaluator})[name]["sem_seg"]
    assert 0 <= scores["bIoU"] <= 100
    with (tmp_path / "confusion_matrix.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    counts = np.array([row[1:] for row in rows], int)
    assert counts.shape == (classes, classes + 1)
    assert counts.sum() > 0.5 * sum(b["height"] * b["width"] for batch in images for b in batch)
    written = sorted((tmp_path / "submission").rglob("*.png"))
    assert len(written) == len(images)
    with Image.open(written[0]) as picture:
        assert picture.size[::-1] == (images[0][0]["height"], images[0][0]["width"])


def test_other_segmenters_may_train_on_padded_crops(shared_data):
    overrides = ["DATASETS.CLASS_COUNT", "auto", "SOLVER.IMS_PER_BATCH", "2"]
    overrides += ["INPUT.MAPPER", "padded_crops", "INPUT.CROP.SIZE", "[65,97]"]
    for slot in ("train", "val"):
        for key, value in entries(shared_data, "camvid", slot).items():
            overrides += [f"DATASETS.CUSTOM.{slot.upper()}.{key.upper()}", str(value)]
    path = model_zoo.get_config_file("CEDNet/upernet_cednet_tiny_shapes", "yaml")
    run = experiment(config.load(path, overrides), device="cpu")
    batch = next(iter(run.build_train_loader()))
    assert batch[0]["image"].shape == (3, 65, 97)
    losses = run.build_model().train()(batch)
    assert all(torch.isfinite(value) for value in losses.values())


def test_another_number_of_classes_is_named_before_the_first_step(shared_data):
    changes = [("DATASETS.CLASS_COUNT", "train.class_count", "check")]
    for kind in KINDS:
        key = {"yaml": "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "lazy": "model.sem_seg_head.num_classes"}
        with pytest.raises(UserError, match=rf"{key[kind]}.*11|11.*{key[kind]}"):
            load(shared_data, "camvid", kind, "hfgd_r50_os4_pascal_context", changes)
