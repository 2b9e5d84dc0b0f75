"""The paper's networks as lazy nodes; every call returns a new one."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2dense.config import segmenters
from d2dense.modeling import LateStrideResNet, TimmBackbone
from hfgd import CARLosses, HFGDHead

FEATURES = ["res0", "res2", "res3", "res4", "res5"]  # res0 tells the head the image's size
RESNET50 = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}
LARGE = {"res2": (192, 4), "res3": (384, 8), "res4": (768, 16), "res5": (1536, 32)}


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


def swin_large():
    """Swin-L with windows of 12; any size of image, rounded up like the paper's crops."""
    return _large("swin_large_patch4_window12_384", size_divisibility=0)


def convnext_large():
    """ConvNeXt-L, for sizes that are multiples of 32 (others are filled up)."""
    return _large("convnext_large")


def convnextv2_large():
    """ConvNeXtV2-L, for sizes that are multiples of 32 (others are filled up)."""
    return _large("convnextv2_large")


def _large(name, **settings):
    return L(TimmBackbone)(
        name=name, out_features=FEATURES, drop_path_rate=0.3, norm_eps=1e-6, **settings
    )


def segmenter(*, num_classes, crop, test_pad=None, backbone=None, shapes=None, **head):
    """A backbone, ResNet-50 by default, under an HFGD head, trained on crops and tested on whole
    images (``inference.multi_scale=true`` for six scales with flips, whose logits are averaged).

    Args:
        test_pad: (height, width) that test images are at least filled up to.
        shapes: (channels, stride) of the backbone's maps at strides 4 to 32, by name.
        head: further arguments of ``HFGDHead``.
    """
    shapes = {"res0": (3, 1), **(RESNET50 if shapes is None else shapes)}
    node = segmenters.segmenter(
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
    node.inference.update(
        average="logits", keep_odd=True, align_corners=True, pad_to=test_pad, pad_value=127.5
    )
    return node


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
