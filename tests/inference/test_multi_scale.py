"""Several sizes in predictions and evaluations, asked for by both kinds of config."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2dense import config, model_zoo
from d2dense.data import shapes
from d2dense.engine.experiment import experiment
from d2dense.engine.train_net import main
from d2dense.errors import UserError
from d2dense.inference import Predictor
from d2dense.modeling import MultiScaleDetector

NAME = "CoDETR/deformable_detr_tiny_shapes"
ASKED = {
    "yaml": ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,128)", "TEST.AUG.MAX_SIZE"]
    + ["160", "TEST.AUG.VOTING_IOU", "0.6", "TEST.AUG.IOU", "0.7"],
    "lazy": [
        "train.test_aug.enabled=true",
        "train.test_aug.min_sizes=[96,128]",
        "train.test_aug.max_size=160",
        "train.test_aug.voting_iou=0.6",
        "train.test_aug.iou=0.7",
    ],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = config.build_model(model_zoo.get_config(NAME), device="cpu")
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def cfg_file(kind):
    return model_zoo.get_config_file(NAME, kind)


def test_both_kinds_have_the_same_defaults():
    by_yaml = config.load(cfg_file("yaml"))
    by_lazy = config.load(cfg_file("lazy"))
    assert not config.is_multi_scale(by_yaml)
    assert not config.is_multi_scale(by_lazy)
    settings = {key.lower(): value for key, value in by_yaml.TEST.AUG.items()}
    lazy = dict(by_lazy.train.test_aug)
    for both in (settings, lazy):
        both["min_sizes"] = list(both["min_sizes"])
    assert settings == lazy
    own = MultiScaleDetector.__init__.__kwdefaults__
    assert {**own, "min_sizes": list(own["min_sizes"]), "enabled": False} == settings


def test_predictions_are_merged_from_each_size_of_the_original(weights):
    image = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    found = {k: Predictor(cfg_file(k), weights, "cpu", ASKED[k])(image) for k in ASKED}
    one, two = (each["instances"] for each in found.values())
    assert len(one) == len(two) > 20
    assert torch.equal(one.scores, two.scores)
    assert torch.equal(one.pred_boxes.tensor, two.pred_boxes.tensor)

    versions = []
    for size in (96, 128):
        changes = [f"dataloader.test.mapper.augmentations.min_size=[{size}]"]
        predict = Predictor(cfg_file("lazy"), weights, "cpu", changes)
        plain = predict(image)["instances"]
        # the predictor mirrors before it resizes; to the same pixels up to rounding
        mirrored = predict(np.ascontiguousarray(image[:, ::-1]))["instances"]
        x0, y0, x1, y1 = mirrored.pred_boxes.tensor.unbind(1)
        mirrored.pred_boxes = Boxes(torch.stack([100 - x1, y0, 100 - x0, y1], 1))
        versions += [plain, mirrored]
    merge = MultiScaleDetector(torch.nn.Identity(), iou=0.7, voting_iou=0.6).merge
    expected = merge(Instances.cat(versions))
    torch.testing.assert_close(one.scores[:20], expected.scores[:20], atol=2e-3, rtol=0)
    torch.testing.assert_close(
        one.pred_boxes.tensor[:20], expected.pred_boxes.tensor[:20], atol=1.0, rtol=0
    )


def test_masks_are_merged_too(tiny_cfg, picture):
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.TEST.AUG.MIN_SIZES = (64, 96)
    found = Predictor(tiny_cfg)(picture)["instances"]
    assert found.pred_masks.shape == (len(found), 50, 70)
    assert len(found) > 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures with objects, as overrides of both kinds of config."""
    root = tmp_path_factory.mktemp("shapes")
    for split, count in (("train", 2), ("val", 5)):
        shapes.generate(output_dir=root, split=split, count=count, size=(70, 100), seed=0)
    found = {"yaml": [], "lazy": []}
    for slot in ("train", "val"):
        files = {"json": root / f"annotations/instances_{slot}.json", "images": root / "images"}
        for key, path in {**files, "images": files["images"] / slot}.items():
            found["yaml"] += [f"DATASETS.CUSTOM.{slot.upper()}.{key.upper()}", str(path)]
            found["lazy"] += [f"datasets.{slot}.{key}={path}"]
    return found


@pytest.mark.parametrize("kind", ASKED)
def test_loaders_of_tests_give_original_images_and_those_of_a_training_do_not(kind, pictures):
    cfg = config.load(cfg_file(kind), [*ASKED[kind], *pictures[kind]])
    original = experiment(cfg, device="cpu", training=False)
    (name,) = original.test_names
    (sample,) = next(iter(original.build_test_loader(name)))
    assert sample["image"].shape[1:] == (70, 100)
    assert isinstance(original.for_tests(torch.nn.Identity()), MultiScaleDetector)
    resized = experiment(cfg, device="cpu")
    (sample,) = next(iter(resized.build_test_loader(name)))
    assert sample["image"].shape[1:] == (112, 160)
    assert isinstance(resized.for_tests(torch.nn.Identity()), torch.nn.Identity)


def evaluated(kind, folder, *flags, pictures, weights):
    path = {"yaml": "MODEL.WEIGHTS", "lazy": "train.init_checkpoint"}[kind]
    output = {"yaml": "OUTPUT_DIR", "lazy": "train.output_dir"}[kind]
    overrides = [*pictures[kind], path, str(weights), output, str(folder)]
    argv = ["--config-file", str(cfg_file(kind)), "--eval-only", "--device", "cpu", *flags]
    assert main([*argv, *ASKED[kind], *overrides]) == 0
    (file,) = folder.glob("inference/*/coco_instances_results.json")
    return sorted(json.loads(file.read_text()), key=lambda r: (r["image_id"], -r["score"]))


def assert_same_results(some, others):
    assert len(some) > 100
    assert len(some) == len(others)
    for one, two in zip(some, others):
        assert one["image_id"] == two["image_id"]
        assert one["category_id"] == two["category_id"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-6)
        assert one["bbox"] == pytest.approx(two["bbox"], abs=1e-3)


def test_evaluations_of_both_kinds_find_the_same(tmp_path, pictures, weights):
    given = {"pictures": pictures, "weights": weights}
    by_yaml, by_lazy = (evaluated(kind, tmp_path / kind, **given) for kind in ASKED)
    assert_same_results(by_yaml, by_lazy)


@pytest.mark.long  # how images are dealt out does not depend on the model
def test_evaluation_by_two_processes_finds_the_same(tmp_path, pictures, weights):
    given = {"pictures": pictures, "weights": weights}
    by_one = evaluated("lazy", tmp_path / "one", **given)
    by_two = evaluated("lazy", tmp_path / "two", "--num-gpus", "2", **given)
    assert_same_results(by_one, by_two)


def test_unknown_settings_of_a_lazy_config_are_one_line():
    cfg = config.load(cfg_file("lazy"), ["train.test_aug.enabled=true"])
    cfg.train.test_aug.scales = [1.0]
    with pytest.raises(UserError, match=r"train.test_aug.*scales"):
        config.for_tests(cfg, torch.nn.Identity())
