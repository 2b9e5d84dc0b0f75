"""RetinaNet on CEDNet-NeXt-T with ordinary blocks in place of the long-range ones (Table 8)."""

from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk.lr_blocks = False
