"""ImageNet-1k classifier on timm's ResNet-50 with the same recipe."""

from .classifier_convnext_t_imagenet import dataloader, lr_multiplier, model, optimizer, train

model.network.name = "resnet50"
