"""RetinaNet on CEDNet-NeXt-T in 12 epochs: two stages, 2/6 of the blocks in
the first (Table 4).
"""

from .retinanet_cednet_next_t_stages_3_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk.blocks = [[2, 4, 2], [4, 8, 4]]
