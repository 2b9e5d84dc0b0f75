"""ImageNet-1k classifier on timm's ConvNeXt-T with the same recipe."""

from detectron2.config import LazyCall as L

from d2dense.modeling import timm_classifier

from .common.imagenet import classifier, dataloader, lr_multiplier, optimizer, train

model = classifier(
    L(timm_classifier)(name="convnext_tiny", num_classes="${..num_classes}", drop_path_rate=0.1)
)
