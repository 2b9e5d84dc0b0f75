"""A narrow head, maps for it, and the backbones' layouts."""

import torch
from detectron2.layers import ShapeSpec

from d2dense.modeling import LateStrideResNet, Segmenter
from hfgd import HFGDHead

CLASSES = 5
STRIDES = {"res0": 1, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
WIDTHS = {"res0": 3, "res2": 8, "res3": 12, "res4": 16, "res5": 24}
SHAPES = {k: ShapeSpec(channels=WIDTHS[k], stride=s) for k, s in STRIDES.items()}
NARROW = {"channels": 16, "encoder_channels": 20, "key_channels": 6, "norm": "BN"}


def head(**options) -> HFGDHead:
    torch.manual_seed(0)
    settings = {"input_shape": SHAPES, "num_classes": CLASSES, **NARROW, **options}
    return HFGDHead(**settings)


def side(length: int, stride: int) -> int:
    """What convolutions of stride 2 with padding make of a side."""
    while stride > 1:
        length, stride = (length + 1) // 2, stride // 2
    return length


def maps(height: int, width: int, images: int = 2, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(
            images,
            WIDTHS[key],
            side(height, stride),
            side(width, stride),
            generator=generator,
            dtype=dtype,
        )
        for key, stride in STRIDES.items()
    }


def labels(height: int, width: int, images: int = 2, seed: int = 0) -> torch.Tensor:
    """Blocks of classes, a part of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, CLASSES + 1, (images, 5, 5), generator=generator)
    blocks[blocks == CLASSES] = 255
    rows, columns = (torch.arange(n) * 5 // n for n in (height, width))
    return blocks[:, rows[:, None], columns]


def backbone(**options) -> LateStrideResNet:
    torch.manual_seed(0)
    settings = {
        "name": "resnet50s",
        "options": {
            "layers": [2, 2, 2, 1],
            "channels": [2, 3, 4, 6],
            "stem_width": 4,
            "zero_init_last": False,  # or no gradient reaches the inside of a block at first
        },
        "multi_grid": [1],
        "out_features": list(STRIDES),
        "size_divisibility": 0,
        **options,
    }
    return LateStrideResNet(**settings)


def segmenter(*, backbone_options=(), pad_to=None, **options) -> Segmenter:
    return Segmenter(
        backbone=backbone(**dict(backbone_options)),
        sem_seg_head=head(**options),
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
        pad_to=pad_to,
    )
