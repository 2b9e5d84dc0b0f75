"""RetinaNet on ConvNeXt-T with BiFPN (Table 1)."""

from detectron2.config import LazyCall as L

from d2dense.modeling.necks import BiFPN

from .retinanet_convnext_t_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(BiFPN)(
    bottom_up=model.backbone.bottom_up, num_layers=7, norm="SyncBN", size_divisibility=128
)
