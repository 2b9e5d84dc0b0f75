"""ImageNet-1k classifier on CEDNet-NeXt-T in Hourglass-style, with a head per stage."""

from detectron2.config import LazyCall as L

from cednet import CEDNetClassifier

from .common.imagenet import classifier, dataloader, lr_multiplier, optimizer, train
from .common.trunks import next_t_hourglass as _trunk

_trunk.drop_path = 0.1
_trunk.last_decoder = False
model = classifier(L(CEDNetClassifier)(trunk=_trunk, num_classes="${..num_classes}"))
