"""RetinaNet on CEDNet-NeXt-T in 12 epochs: three stages (Tables 4 and 6).

The last stage has its decoder, with which the sizes of these tables agree best.
"""

from .common.coco_1x import dataloader, lr_multiplier, optimizer, train
from .retinanet_cednet_next_t import model

model.backbone.trunk.last_decoder = True
