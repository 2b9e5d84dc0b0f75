"""RetinaNet on ConvNeXt-T with NAS-FPN (Table 1)."""

from detectron2.config import LazyCall as L

from d2dense.modeling.necks import NASFPN

from .retinanet_convnext_t_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(NASFPN)(
    bottom_up=model.backbone.bottom_up, num_stages=3, norm="SyncBN", size_divisibility=128
)
