"""RetinaNet on CEDNet-NeXt-T in 12 epochs: two stages of the same size (Tables 4 and 6)."""

from .retinanet_cednet_next_t_stages_3_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk.blocks = [[3, 6, 3], [3, 6, 3]]
