"""RetinaNet on ResNet-50 with FPN (Table 5): batch norms train and are synchronised.

``model.backbone.bottom_up.pretrained=true`` starts from timm's ImageNet weights.
"""

from d2dense.config import detectors

from .common.coco import dataloader, lr_multiplier, optimizer, train

model = detectors.retinanet(
    backbone=detectors.timm_fpn(
        "resnet50",
        top="p6p7",
        out_norm="",
        size_divisibility=128,
    )
)
model.backbone.bottom_up.norm = "SyncBN"
optimizer.params.layer_decay = 1.0
