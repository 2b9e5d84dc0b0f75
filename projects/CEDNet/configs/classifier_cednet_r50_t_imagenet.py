"""ImageNet-1k classifier on CEDNet with ResNet's blocks, with a head per stage."""

from detectron2.config import LazyCall as L

from cednet import CEDNetClassifier

from .common.imagenet import classifier, dataloader, lr_multiplier, optimizer, train
from .common.trunks import r50_t as _trunk

_trunk.drop_path = 0.0
model = classifier(L(CEDNetClassifier)(trunk=_trunk, num_classes="${..num_classes}"))
