"""ImageNet-1k from scratch in 300 epochs: ConvNeXt's recipe, as in the paper."""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.modeling import ImageClassifier

_IMAGES = 1_281_167
_BATCH = 4096  # 8 processes of 128 images, 4 times
_LR, _END_LR = 4e-3, 1e-6
_WARMUP_EPOCHS = 20


def iterations(epochs):
    """Epochs in optimizer steps, rounded half up."""
    return (2 * _IMAGES * epochs + _BATCH) // (2 * _BATCH)


def classifier(network):
    """The losses and mixing of images of the recipe around a network."""
    return L(ImageClassifier)(
        network=network, num_classes=1000, label_smoothing=0.1, mixup=0.8, cutmix=1.0
    )


def schedule(epochs):
    """From 0 to the full rate in 20 epochs, then a cosine to 1e-6."""
    return common.cosine_after_warmup(
        max_iter=iterations(epochs),
        end_factor=_END_LR / _LR,
        warmup_iters=iterations(_WARMUP_EPOCHS),
    )


def settings(epochs):
    """Mixed precision, averaged weights; the rate follows the batch; a checkpoint every epoch."""
    return common.train(
        max_iter=iterations(epochs),
        accumulation_steps=4,
        amp={"enabled": True},
        ema={"enabled": True, "decay": 0.9999},
        lr_scaling={"rule": "linear", "reference_batch": _BATCH},
        checkpointer={"period": iterations(1), "max_to_keep": 3},
        eval_period=10 * iterations(1),
        best={"metric": "classification/top1"},
        channels_last=True,
    )


dataloader = common.classification_loader(batch_size=_BATCH)
optimizer = common.adamw(lr=_LR, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = schedule(300)
train = settings(300)
