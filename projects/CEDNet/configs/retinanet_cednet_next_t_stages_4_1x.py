"""RetinaNet on CEDNet-NeXt-T in 12 epochs: four stages (Table 6)."""

from .retinanet_cednet_next_t_stages_3_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk.blocks = [[1, 4, 1], [1, 4, 1], [1, 4, 1], [1, 4, 1]]
