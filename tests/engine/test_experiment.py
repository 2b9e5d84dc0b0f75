"""Both adapters give the same things and turn the datasets of a config into loaders."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from d2dense import config
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError

NAME = "FSCascade/fscascade_tiny_shapes"
KINDS = ("yaml", "lazy")


@pytest.fixture
def own_data(tmp_path):
    """Four pictures with one box each, of three classes with gaps between their ids."""
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((40, 60, 3), 50 * index, np.uint8))
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 40, "width": 60} for k in range(4)],
        "annotations": [
            {"id": k + 1, "image_id": k, "category_id": (3, 7, 9, 3)[k]}
            | {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
            for k in range(4)
        ],
        "categories": [{"id": i, "name": n} for i, n in ((3, "a"), (7, "b"), (9, "c"))],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path


def load(kind, repo_root, items=()):
    suffix = {"yaml": "yaml", "lazy": "py"}[kind]
    return config.load(repo_root / "projects/FSCascade/configs" / f"{NAME[10:]}.{suffix}", items)


def custom(kind, slot, folder):
    prefix = f"DATASETS.CUSTOM.{slot.upper()}" if kind == "yaml" else f"datasets.{slot}"
    if kind == "yaml":
        return [f"{prefix}.JSON", str(folder / "boxes.json"), f"{prefix}.IMAGES={folder}"]
    return [f"{prefix}.json={folder / 'boxes.json'}", f"{prefix}.images", str(folder)]


AUTO = {"yaml": ["DATASETS.CLASS_COUNT", "auto"], "lazy": ["train.class_count=auto"]}
BATCH = {"yaml": "SOLVER.IMS_PER_BATCH", "lazy": "dataloader.train.total_batch_size"}
STEPS = {"yaml": "SOLVER.ACCUMULATION_STEPS", "lazy": "train.accumulation_steps"}


@pytest.mark.parametrize("kind", KINDS)
def test_own_data_by_overrides_alone(kind, own_data, repo_root):
    items = [*custom(kind, "train", own_data), *custom(kind, "val", own_data), *AUTO[kind]]
    run = experiment(load(kind, repo_root, [*items, f"{BATCH[kind]}=2"]), device="cpu")
    assert run.train_names == ["custom_train"]
    assert run.test_names == ["custom_val"]
    model = run.build_model()
    assert model.roi_heads.num_classes == 3
    assert model.roi_heads.box_predictor[2].cls_score.out_features == 4
    batch = next(iter(run.build_train_loader()))
    assert len(batch) == 2
    assert all(sample["instances"].gt_classes.max() < 3 for sample in batch)
    tests = [image for images in run.build_test_loader("custom_val") for image in images]
    evaluator = run.build_evaluator("custom_val", None)
    with torch.no_grad():
        evaluator.process(tests, model.eval()(tests))
    assert evaluator.evaluate()["bbox"].keys() >= {"AP", "AP50", "AP@0.75", "AP-a", "AP-c"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_slot_is_a_test_set(kind, own_data, repo_root):
    items = [part for slot in ("train", "val", "night") for part in custom(kind, slot, own_data)]
    run = experiment(load(kind, repo_root, [*items, *AUTO[kind]]), device="cpu")
    assert run.test_names == ["custom_val", "custom_night"]


@pytest.mark.parametrize(
    ("kind", "key"), [("yaml", "MODEL.ROI_HEADS.NUM_CLASSES"), ("lazy", "roi_heads.num_classes")]
)
def test_wrong_class_count_names_the_key(kind, key, own_data, repo_root):
    items = [*custom(kind, "train", own_data), *custom(kind, "val", own_data)]
    with pytest.raises(UserError, match=rf"{key} = 10.* 3"):
        experiment(load(kind, repo_root, items), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_splits_the_batch(kind, own_data, repo_root):
    items = [*custom(kind, "train", own_data), *custom(kind, "val", own_data), *AUTO[kind]]
    items += [f"{BATCH[kind]}=4", f"{STEPS[kind]}=2"]
    run = experiment(load(kind, repo_root, items), device="cpu")
    assert len(next(iter(run.build_train_loader()))) == 2
    run = experiment(load(kind, repo_root, [*items, f"{STEPS[kind]}=3"]), device="cpu")
    with pytest.raises(UserError, match="3 accumulation steps"):
        run.build_train_loader()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_alone_looks_at_the_test_sets_only(kind, own_data, repo_root):
    cfg = load(kind, repo_root, [*custom(kind, "val", own_data), *AUTO[kind]])
    with pytest.raises(UserError, match="different classes"):
        experiment(cfg, device="cpu")
    run = experiment(cfg, device="cpu", training=False)
    assert run.build_model().roi_heads.num_classes == 3
    assert run.train_names == ["shapes_train"]


def test_both_kinds_are_told_the_same(repo_root):
    """Settings, schedule and optimizer of one model; the data of shapes is not read for it."""
    runs = [experiment(load(kind, repo_root), device="cpu") for kind in KINDS]
    assert runs[0].settings == runs[1].settings
    assert runs[0].test_names == runs[1].test_names == ["shapes_val"]
    curves = [[run.build_lr_multiplier()(k / 40) for k in range(40)] for run in runs]
    assert curves[0] == pytest.approx(curves[1])
    optimizers = [run.build_optimizer(run.build_model()) for run in runs]
    assert type(optimizers[0]) is type(optimizers[1])
    for a, b in zip(*(o.param_groups for o in optimizers)):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]


def test_the_callers_config_stays_as_it_is(own_data, repo_root):
    cfg = load("lazy", repo_root, [*custom("lazy", "train", own_data), *AUTO["lazy"]])
    cfg.dataloader.test.dataset.names = None
    before = config.dump(cfg)
    run = experiment(cfg, device="cpu")
    assert run.cfg.model.roi_heads.num_classes == 3
    assert config.dump(cfg) == before


def test_unknown_solver_names_list_the_known_ones(repo_root):
    run = experiment(load("yaml", repo_root, ["SOLVER.OPTIMIZER", "Adam"]), device="cpu")
    with pytest.raises(UserError, match="SGD or AdamW"):
        run.build_optimizer(torch.nn.Linear(1, 1))
    name = ["SOLVER.LR_SCHEDULER_NAME", "WarmupPoly"]
    run = experiment(load("yaml", repo_root, name), device="cpu")
    with pytest.raises(UserError, match="did you mean 'WarmupPolyLR'"):
        run.build_lr_multiplier()


def test_early_stop_needs_a_metric(repo_root):
    with pytest.raises(UserError, match="BEST_METRIC"):
        experiment(load("yaml", repo_root, ["TEST.EARLY_STOP_PATIENCE", "2"]), device="cpu")
