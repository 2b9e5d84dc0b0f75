"""The baseline of retinanet_cednet_tiny_shapes: a small ConvNeXt under a feature pyramid, of the
same cost (0.080 GMAC at 160 x 160, CEDNet's 0.081).
"""

from d2dense.config import detectors

from .retinanet_cednet_tiny_shapes import dataloader, lr_multiplier, model, optimizer, train

_dims = [24, 48, 64, 96]
model.backbone = detectors.timm_fpn(
    "convnext_tiny", top="p6p7", channels=model.backbone.out_channels
)
model.backbone.bottom_up.options = {"dims": _dims, "depths": [2, 1, 2, 1], "ls_init_value": 1.0}
