"""The paper's networks as lazy nodes; every call returns a new one."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2dense.config import segmenters
from d2dense.modeling import LateStrideResNet, TimmBackbone
from hfgd import CARLosses, HFGDHead

FEATURES = ["res0", "res2", "res3", "res4", "res5"]  # res0 tells the head the image's size
RESNET50 = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}


def resnet50(layout="late_stride"):
    """ResNet-50 with synchronised norms that are trained.

    Args:
        layout: ``late_stride`` is the paper's; ``torchvision`` and ``deep_stem`` halve the size in
            the first block of a stage and have public weights (timm's resnet50.tv_in1k and
            resnet50s.gluon_in1k).
    """
    common = {
        "out_features": FEATURES,
        "norm": "SyncBN",
        "norm_eps": 1.001e-5,
        "norm_momentum": 3e-4,
        "size_divisibility": 0,
    }
    if layout == "late_stride":
        return L(LateStrideResNet)(name="resnet50s", **common)
    name = {"torchvision": "resnet50", "deep_stem": "resnet50s"}[layout]
    return L(TimmBackbone)(name=name, out_indices=[1, 2, 3, 4], **common)


def segmenter(*, num_classes, crop, backbone=None, shapes=None, **head):
    """A backbone, ResNet-50 by default, under an HFGD head, trained on crops and tested on whole
    images.

    Args:
        shapes: (channels, stride) of the backbone's maps at strides 4 to 32, by name.
        head: further arguments of ``HFGDHead``.
    """
    shapes = {"res0": (3, 1), **(RESNET50 if shapes is None else shapes)}
    return segmenters.segmenter(
        backbone=resnet50() if backbone is None else backbone,
        head=L(HFGDHead)(
            input_shape={
                name: L(ShapeSpec)(channels=channels, stride=stride)
                for name, (channels, stride) in shapes.items()
            },
            num_classes=num_classes,
            car=L(CARLosses)(),
            **head,
        ),
        crop=crop,
        slide=False,
    )


# SemanticFPN as the paper compares with it
SEMANTIC_FPN = {"encoder": "identity", "upsampler": "sfpn", "hfgm": False}
# SA (CAR) at output stride 8, with a backbone of that output stride
SELF_ATTENTION_D8 = {
    "in_features": ["res5"],
    "channels": 512,
    "lead_convs": 1,
    "lead_kernel": 3,
    "upsampler": "none",
    "hfgm": False,
}
