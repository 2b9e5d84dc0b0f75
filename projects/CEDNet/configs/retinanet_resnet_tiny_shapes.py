"""The baseline of retinanet_cednet_tiny_shapes: a small ResNet under a feature pyramid, of the same
cost (0.081 GMAC at 160 x 160).
"""

from d2dense.config import detectors

from .retinanet_cednet_tiny_shapes import dataloader, lr_multiplier, model, optimizer, train

_channels = [16, 32, 48, 64]
model.backbone = detectors.timm_fpn(
    "resnet18",
    top="p6p7",
    channels=model.backbone.out_channels,
    out_norm="",
)
model.backbone.bottom_up.options = {
    "channels": _channels,
    "layers": [1, 2, 2, 1],
    "stem_type": "deep",
    "stem_width": 8,
}
