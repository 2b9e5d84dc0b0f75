"""RetinaNet on HRNet-W32 with HRNet's pyramid (Table 1)."""

from detectron2.config import LazyCall as L

from d2dense.config import detectors
from d2dense.modeling import TimmBackbone
from d2dense.modeling.necks import HRFPN

from .common.coco import dataloader, lr_multiplier, optimizer, train

model = detectors.retinanet(
    backbone=L(HRFPN)(
        bottom_up=L(TimmBackbone)(
            name="hrnet_w32",
            out_indices=[1, 2, 3, 4],
            norm="SyncBN",
            options={"feature_location": ""},
        ),
        size_divisibility=128,
    )
)
optimizer.params.layer_decay = 1.0
