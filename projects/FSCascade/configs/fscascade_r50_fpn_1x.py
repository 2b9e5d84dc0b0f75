"""FSCascade: classification and localisation features shared between stages."""

from .common.coco import dataloader, lr_multiplier, optimizer, train
from .common.fscascade_r50_fpn import model
