"""Small real detectors and batches of objects, the same in every process."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from d2dense import config, model_zoo

SIZE = 64


def tiny_config(name: str = "FSCascade/fscascade_mask_tiny_shapes", *, norm: str = "BN") -> CfgNode:
    """Return a tiny detector's config whose losses do not depend on chance or on the shards.

    Detectron2 draws anchors and proposals at random and divides the box losses by how many it
    drew. Here it takes all: every image gives as many regions, whatever it holds, as long as all
    images have equally many objects.
    """
    cfg = config.load(model_zoo.get_config_file(name, "yaml"))
    cfg.defrost()
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.RESNETS.NORM = model.FPN.NORM = norm
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 8
    model.FPN.OUT_CHANNELS = 8
    model.ROI_BOX_HEAD.FC_DIM = 16
    model.ROI_MASK_HEAD.NUM_CONV, model.ROI_MASK_HEAD.CONV_DIM = 1, 8
    model.RPN.BATCH_SIZE_PER_IMAGE = model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10_000
    model.RPN.NMS_THRESH = 1.0  # suppresses nothing
    model.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.freeze()
    return cfg


def retinanet_config() -> CfgNode:
    cfg = tiny_config("FSCascade/faster_rcnn_tiny_shapes", norm="GN")
    cfg.defrost()
    model = cfg.MODEL
    model.META_ARCHITECTURE = "RetinaNet"
    model.RESNETS.NORM = model.FPN.NORM = "FrozenBN"
    model.ANCHOR_GENERATOR.SIZES = [[10], [20], [40], [80]]
    model.RETINANET.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.RETINANET.NUM_CONVS, model.RETINANET.NUM_CLASSES = 1, 10
    cfg.freeze()
    return cfg


def build(cfg: CfgNode, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg).train()


def image(number: int, objects: int) -> dict:
    """A picture of noise with some objects, always the same for a number."""
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(objects, 2, generator=generator) * SIZE / 2
    boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(objects, 2, generator=generator)], 1)
    found = Instances((SIZE, SIZE))
    found.gt_boxes = Boxes(boxes)
    found.gt_classes = torch.arange(objects) % 10
    found.gt_masks = PolygonMasks([[[a, b, c, b, c, d, a, d]] for a, b, c, d in boxes.tolist()])
    pixels = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator)
    return {"image": pixels.to(torch.uint8), "instances": found, "height": SIZE, "width": SIZE}
