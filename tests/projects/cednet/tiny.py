"""CEDNets that are small enough to run many times."""

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from cednet import CEDNet, CEDNetTrunk
from cednet.blocks import BottleneckFamily, CSwinFamily, NextFamily, SwinFamily
from d2dense.config import detectors

FAMILIES = {
    "next": NextFamily(layer_scale=1.0),
    "bottleneck": BottleneckFamily(),
    "swin": SwinFamily(head_channels=8),
    "cswin": CSwinFamily(head_channels=8),
}
RETINA = ("p3", "p4", "p5", "p6", "p7")
TWO_STAGE = ("p2", "p3", "p4", "p5", "p6")
RAW = ("c2", "c3", "c4", "c5", "stage1_c3")


def trunk(mixer="next", **options) -> CEDNetTrunk:
    torch.manual_seed(0)
    options = {"blocks": (2, 2, 2), "num_stages": 2, "first_blocks": 2, **options}
    return CEDNetTrunk(family=FAMILIES[mixer], widths=(16, 32, 48, 64), **options)


def backbone(mixer="next", features=RETINA, **options) -> CEDNet:
    net = trunk(mixer, **options)
    return CEDNet(trunk=net, out_features=features, out_channels=16).eval()


def detector(kind, scales=None):
    """One of :mod:`d2dense.config.detectors`, for three classes; ``scales`` are those of
    RetinaNet's anchors, in strides.
    """
    features = RETINA if kind == "retinanet" else TWO_STAGE
    node = getattr(detectors, kind)(
        backbone=L(backbone)(features=features), num_classes=3, channels=16
    )
    if scales is not None:
        strides = node.anchor_generator.strides
        node.anchor_generator.sizes = [[scale * stride for scale in scales] for stride in strides]
        node.head.num_anchors = 3 * len(scales)
    return instantiate(node).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a, b, atol=1e-5 * float(b.std(correction=0)) + 1e-6
    )
