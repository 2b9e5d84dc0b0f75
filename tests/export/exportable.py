"""Tiny models of every exportable kind, built in code with seeded weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

import fscascade  # noqa: F401 (registers its heads)
from d2dense.config import get_cfg

NUM_CLASSES = 5
TEST_SCORES = ("last", "stage1", "stage2", "ensemble_last_rois", "ensemble_own_rois")


@BACKBONE_REGISTRY.register()
def build_exportable_backbone(cfg, input_shape):
    """Return a ResNet of one narrow block per stage with a pyramid, as in Detectron2's builders."""
    widths = (16, 16, 24, 32, 40)
    stages = [
        ResNet.make_stage(
            BasicBlock, 1, stride=1 + (k > 0), in_channels=a, out_channels=b, norm="FrozenBN"
        )
        for k, (a, b) in enumerate(pairwise(widths))
    ]
    levels = cfg.MODEL.FPN.IN_FEATURES
    top = LastLevelMaxPool() if levels[0] == "res2" else LastLevelP6P7(widths[-1], 32)
    resnet = ResNet(BasicStem(3, widths[0], "FrozenBN"), stages, out_features=list(levels))
    return FPN(resnet, levels, 32, top_block=top)


def tiny_cfg(heads="FSCascadeROIHeads", *, mask=False, arch="GeneralizedRCNN", **fscascade_keys):
    """Return a yacs config of a narrow FPN model."""
    cfg = get_cfg()
    model = cfg.MODEL
    model.DEVICE, model.META_ARCHITECTURE, model.MASK_ON = "cpu", arch, mask
    model.PIXEL_STD = [58.0, 57.0, 57.0]
    dense = arch.endswith("RetinaNet")
    model.BACKBONE.NAME = "build_exportable_backbone"
    model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"][dense:]
    model.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.POST_NMS_TOPK_TEST = 60
    model.ROI_HEADS.NAME, model.ROI_HEADS.NUM_CLASSES = heads, NUM_CLASSES
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.2
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    box, masks = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 64, 7
    box.CLS_AGNOSTIC_BBOX_REG = "Cascade" in heads
    masks.NAME, masks.NUM_CONV, masks.CONV_DIM = "MaskRCNNConvUpsampleHead", 1, 16
    masks.POOLER_RESOLUTION = 14
    model.RETINANET.NUM_CLASSES = model.SEM_SEG_HEAD.NUM_CLASSES = NUM_CLASSES
    model.RETINANET.SCORE_THRESH_TEST = 0.0
    model.SEM_SEG_HEAD.CONVS_DIM = 32
    for key, value in fscascade_keys.items():
        model.FSCASCADE[key] = value
    return cfg


def tiny_model(*args, seed=0, spread=True, **kwargs):
    """Return the model in evaluation mode.

    ``spread`` makes the last layers' weights larger, so that boxes move by more than rounding and
    scores differ.
    """
    torch.manual_seed(seed)
    model = build_model(tiny_cfg(*args, **kwargs)).eval()
    if spread:
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_score.weight", "bbox_pred.weight", "mask_fcn_logits.weight")):
                parameter.data.normal_(std=0.1 if "cls" in name else 0.05)
    return model


def picture(height, width, *, seed=0, dtype=torch.uint8):
    """Return blocks of random colours ``(3, height, width)`` in [0, 255]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(1, 3, 7, 9, generator=generator) * 255
    image = torch.nn.functional.interpolate(blocks, (height, width), mode="bilinear")[0]
    return image.round().to(dtype)


def run_here(path, images):
    """What the fresh process does, in this one; for tests of something else."""
    module = torch.jit.load(str(path))
    with torch.no_grad():
        return [module(image) for image in images]
