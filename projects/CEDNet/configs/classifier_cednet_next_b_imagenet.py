"""ImageNet-1k classifier on CEDNet-NeXt-B, with a head per stage."""

from detectron2.config import LazyCall as L

from cednet import CEDNetClassifier

from .common.imagenet import classifier, dataloader, lr_multiplier, optimizer, train
from .common.trunks import next_b as _trunk

_trunk.drop_path = 0.5
model = classifier(L(CEDNetClassifier)(trunk=_trunk, num_classes="${..num_classes}"))
