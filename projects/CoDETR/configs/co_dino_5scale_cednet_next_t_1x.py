"""Co-DINO on the five levels of CEDNet-NeXt-T, 12 epochs with the recipe of ResNet-50 (in neither
paper).

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from d2dense import model_zoo

from .co_dino_5scale_r50_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone = model_zoo.get_config("CEDNet/deformable_detr_cednet_next_t").model.backbone
model.in_features = model.backbone.out_features = ["p2", "p3", "p4", "p5", "p6"]
model.neck = None
train.init_checkpoint = ""
