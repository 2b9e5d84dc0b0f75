"""Both kinds of config of detectors in two stages, and mistakes in them."""

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from d2dense.config import detr
from d2dense.config.defaults import get_cfg
from d2dense.errors import UserError
from d2dense.modeling.detr import (
    DeformableDETR,
    parts,
)
from tests.modeling.detr.test_two_stage import KINDS

YAML = {
    "deformable_detr_plus_plus": {
        "FEEDFORWARD": 2048,
        "DROPOUT": 0.0,
        "BOX_REFINEMENT": True,
        "LOOK_FORWARD_TWICE": True,
        "TWO_STAGE": True,
    }
}
YAML["dino"] = {
    **YAML["deformable_detr_plus_plus"],
    "POSITION_TEMPERATURE": 20.0,
    "POSITION_OFFSET": 0.0,
    "NUM_QUERIES": 900,
    "BINARY_PROPOSALS": False,
    "QUERY_POSITIONS": "references",
    "FINAL_NORM": True,
    "REFERENCE_EPS": 1e-3,
    "CLASS_WEIGHT": 1.0,
}
DENOISING = {"dino": 100}


def detr_node(kind):
    node = get_cfg().MODEL.DETR
    for key, value in YAML[kind].items():
        node[key] = value
    node.DENOISING.QUERIES = DENOISING.get(kind, 0)
    return node


def settings(module):
    """Every plain attribute of a module and its parts."""
    plain = (int, float, str, bool, type(None))
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, plain) and key != "training"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_config_build_the_same(kind):
    node = getattr(detr, kind)(backbone=None, in_features="abcd")
    with torch.device("meta"):
        yaml = parts.transformer(detr_node(kind))
        yaml["criterion"] = parts.criterion(detr_node(kind))
        # the parts refer to the whole's number of classes
        node.backbone = nn.Identity()
        lazy = instantiate(node)
    for name, part in yaml.items():
        other = getattr(lazy, name)
        if part is None:
            assert other is None
            continue
        shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (part, other)]
        assert shapes[0] == shapes[1]
        assert settings(part) == settings(other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TRANSFORMER", "x", "TRANSFORMER is 'x'; expected one of deformable"),
        ("QUERY_POSITIONS", "x", "QUERY_POSITIONS is 'x'; expected one of queries, references"),
        ("QUERY_POSITIONS", "references", "set TWO_STAGE to True"),
    ],
)
def test_mistakes(key, value, message):
    node = get_cfg().MODEL.DETR
    node[key] = value
    with torch.device("meta"), pytest.raises(UserError, match=message):
        parts.transformer(node)


def test_denoising_takes_positions_of_references():
    node = detr_node("deformable_detr_plus_plus")
    node.DENOISING.QUERIES = 100
    with torch.device("meta"), pytest.raises(UserError, match="QUERY_POSITIONS to references"):
        parts.transformer(node)


def test_unknown_class_loss():
    node = get_cfg().MODEL.DETR
    node.CLASS_LOSS = "x"
    with pytest.raises(UserError, match="expected one of focal, quality_focal"):
        parts.criterion(node)


def test_yaml_settings_of_the_whole():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.NAME = "convnext_atto"
    for key, value in YAML["dino"].items():
        cfg.MODEL.DETR[key] = value
    cfg.MODEL.DETR.NECK = "channel_mapper"
    cfg.MODEL.DETR.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DETR.CLASS_LOSS = "quality_focal"
    cfg.MODEL.DETR.MASK_PADDING = False
    cfg.MODEL.DETR.MAX_DETECTIONS = 300
    cfg.MODEL.DETR.SOFT_NMS.update(ENABLED=True, IOU=0.7, MIN_SCORE=0.01, BY_OFFSET=True)
    cfg.MODEL.DETR.DENOISING.update(QUERIES=50, LABEL_NOISE=0.2, BOX_NOISE=0.4)
    with torch.device("meta"):
        model = DeformableDETR(cfg)
    assert vars(model.selection) == {
        "max_detections": 300,
        "soft_nms_iou": 0.7,
        "min_score": 0.01,
        "by_offset": True,
    }
    assert not model.mask_padding
    assert model.criterion.class_loss == "quality_focal"
    assert (model.criterion.class_weight, model.criterion.matcher.class_weight) == (1.0, 2.0)
    noise = model.denoising
    assert (noise.num_queries, noise.label_noise, noise.box_noise) == (50, 0.2, 0.4)
    cfg.MODEL.DETR.SOFT_NMS.ENABLED = False
    with torch.device("meta"):
        assert DeformableDETR(cfg).selection.soft_nms_iou is None
