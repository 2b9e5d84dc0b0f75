"""The predictor: both kinds of config, every kind of input, the config's preprocessing."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall
from detectron2.engine import DefaultPredictor
from PIL import Image

from d2dense import config
from d2dense.errors import UserError
from d2dense.inference import Predictor

LAZY = "FSCascade/fscascade_tiny_shapes"


def assert_same(one: dict, two: dict) -> None:
    a, b = one["instances"], two["instances"]
    assert len(a) == len(b) > 0
    assert torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    if a.has("pred_masks"):
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3


def checkpoint_of(cfg, path: Path) -> Path:
    """Save random weights, small enough that boxes stay near their anchors."""
    torch.manual_seed(1)
    state = config.build_model(cfg).state_dict()
    for name, value in state.items():
        if name.startswith("backbone") and value.ndim == 4:
            value *= 0.7
    torch.save({"model": state}, path)
    return path


def test_equals_detectron2s_own_predictor(tiny_cfg, picture, tmp_path):
    weights = checkpoint_of(tiny_cfg, tmp_path / "model.pth")
    ours = Predictor(tiny_cfg, weights)(picture)
    tiny_cfg.MODEL.WEIGHTS = str(weights)
    theirs = DefaultPredictor(tiny_cfg)(picture)
    assert_same(ours, theirs)
    assert ours["instances"].image_size == (50, 70)


def test_list_and_single_and_path_agree(tiny_cfg, picture, tmp_path):
    predictor = Predictor(tiny_cfg, batch_size=2)
    path = tmp_path / "p.png"
    cv2.imwrite(str(path), picture)
    single = predictor(picture)
    flipped = predictor(picture[::-1])
    outputs = predictor([picture, path, str(path), picture[::-1]])
    assert len(outputs) == 4
    for output in outputs[:3]:
        assert_same(output, single)
    assert_same(outputs[3], flipped)
    assert not torch.equal(flipped["instances"].scores, single["instances"].scores)
    assert predictor([]) == []


def test_pictures_of_different_sizes_in_one_batch_keep_their_sizes(tiny_cfg, picture):
    predictor = Predictor(tiny_cfg)
    first, second = predictor([picture, picture[:31]])
    assert first["instances"].image_size == (50, 70)
    assert second["instances"].image_size == (31, 70)
    assert second["instances"].pred_masks.shape[1:] == (31, 70)


def test_lazy_config_by_model_zoo_name(picture):
    predictor = Predictor(LAZY, overrides=["model.roi_heads.box_predictors.2.test_score_thresh=0"])
    assert config.kind_of(predictor.cfg) == "lazy"
    assert predictor.metadata.thing_classes[0] == "disc"
    instances = predictor(picture)["instances"]
    assert instances.image_size == (50, 70)
    assert not predictor.model.training


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_saved_configs_predict_the_same(tiny_cfg, picture, tmp_path, kind):
    threshold = "model.roi_heads.box_predictors.2.test_score_thresh=0"
    cfg = tiny_cfg if kind == "yaml" else config.load(LAZY, [threshold])
    weights = checkpoint_of(cfg, tmp_path / "model.pth")
    config.save(cfg, tmp_path / "config.yaml")
    from_file = Predictor(tmp_path / "config.yaml", weights)
    assert config.kind_of(from_file.cfg) == kind
    assert_same(from_file(picture), Predictor(cfg, weights)(picture))


# Preprocessing ------------------------------------------------------------------------------------


def test_resizing_comes_from_the_yaml_config(tiny_cfg, picture):
    shape = Predictor(tiny_cfg).preprocess(picture)["image"].shape
    assert shape == (3, 64, 90)  # 50 -> 64, 70 -> 89.6
    overrides = ["INPUT.MAX_SIZE_TEST", "70"]
    assert Predictor(tiny_cfg, overrides=overrides).preprocess(picture)["image"].shape == (
        3,
        50,
        70,
    )


def test_resizing_comes_from_the_lazy_config(picture):
    key = "dataloader.test.mapper.augmentations"
    predictor = Predictor(LAZY, overrides=[f"{key}.min_size=[100]", f"{key}.max_size=1000"])
    inputs = predictor.preprocess(picture)
    assert inputs["image"].shape == (3, 100, 140)
    assert (inputs["height"], inputs["width"]) == (50, 70)


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
def test_channel_order_comes_from_the_config(tiny_cfg, picture, image_format):
    overrides = ["INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", "0"]
    if image_format == "L":
        overrides += ["MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[1.0]"]
        tiny_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    image = Predictor(tiny_cfg, overrides=overrides).preprocess(picture)["image"].numpy()
    if image_format == "L":
        grey = picture @ np.array([0.114, 0.587, 0.299])
        assert np.abs(image[0] - grey).max() <= 1
    else:
        expected = picture if image_format == "BGR" else picture[:, :, ::-1]
        assert np.array_equal(image, expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_of_files_is_applied(tiny_cfg, picture, tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture[:, :, ::-1]).save(tmp_path / "photo.png", exif=exif)
    predictor = Predictor(tiny_cfg, overrides=["INPUT.MIN_SIZE_TEST", "0"])
    inputs = predictor.preprocess(tmp_path / "photo.png")
    expected = turn(picture)
    assert np.array_equal(inputs["image"].numpy().transpose(1, 2, 0), expected)
    assert (inputs["height"], inputs["width"]) == expected.shape[:2]


# Weights and datasets -----------------------------------------------------------------------------


class BareMapper:
    """Takes records and says nothing of how."""


def test_a_mapper_that_says_nothing_of_pictures_is_named():
    cfg = config.load(LAZY)
    cfg.dataloader.test.mapper = LazyCall(BareMapper)()
    with pytest.raises(UserError, match=r"a BareMapper.* attributes augmentations and"):
        Predictor(cfg)


def test_weights_are_loaded(tiny_cfg, tmp_path):
    weights = checkpoint_of(tiny_cfg, tmp_path / "model.pth")
    saved = torch.load(weights)["model"]
    by_argument = Predictor(tiny_cfg, weights).model.state_dict()
    by_override = Predictor(tiny_cfg, overrides=["MODEL.WEIGHTS", str(weights)]).model.state_dict()
    tiny_cfg.MODEL.WEIGHTS = str(weights)
    by_config = Predictor(tiny_cfg).model.state_dict()
    for state in (by_argument, by_override, by_config):
        assert all(torch.equal(state[name], value) for name, value in saved.items())


def test_no_weights_is_a_warning_and_backbones_elsewhere_are_not_fetched(tiny_cfg, caplog):
    tiny_cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    with caplog.at_level(logging.WARNING):
        Predictor(tiny_cfg)
    assert "untrained" in caplog.text


def test_weights_that_do_not_fit_are_one_line(tiny_cfg, tmp_path):
    weights = checkpoint_of(tiny_cfg, tmp_path / "model.pth")
    tiny_cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 24
    with pytest.raises(UserError, match="shape"):
        Predictor(tiny_cfg, weights)
    with pytest.raises(UserError, match="nowhere"):
        Predictor(tiny_cfg, tmp_path / "nowhere.pth")


def test_unknown_data_sets_do_not_prevent_predicting(tiny_cfg, picture, caplog):
    tiny_cfg.DATASETS.TEST = ("not_registered_here",)
    with caplog.at_level(logging.WARNING):
        predictor = Predictor(tiny_cfg)
    assert "class names are unknown" in caplog.text
    assert len(predictor(picture)["instances"])
    assert predictor.metadata.get("thing_classes") is None


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        3,
        "missing.jpg",
    ],
)
def test_bad_pictures_are_one_line(tiny_cfg, bad):
    with pytest.raises(UserError, match=r"picture|missing\.jpg"):
        Predictor(tiny_cfg)(bad)


def test_sixteen_bit_files_look_like_their_eight_bit_ones(tiny_cfg, picture, tmp_path):
    grey = picture[:, :, 0]
    cv2.imwrite(str(tmp_path / "8.png"), grey)
    cv2.imwrite(str(tmp_path / "16.png"), grey.astype(np.uint16) * 257)
    predictor = Predictor(tiny_cfg)
    inputs = [predictor.preprocess(tmp_path / name)["image"] for name in ("8.png", "16.png")]
    assert torch.equal(*inputs)


def test_broken_file_names_the_file(tiny_cfg, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        Predictor(tiny_cfg)(path)
