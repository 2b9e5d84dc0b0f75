"""A small CEDNet that learns the classes of the generated objects in minutes on a CPU."""

from detectron2.config import LazyCall as L

from cednet import CEDNetClassifier, CEDNetTrunk, NextFamily
from d2dense.config import common
from d2dense.data.classification import imagenet as _steps
from d2dense.modeling import ImageClassifier

model = L(ImageClassifier)(
    network=L(CEDNetClassifier)(
        trunk=L(CEDNetTrunk)(
            family=L(NextFamily)(layer_scale=1.0),
            widths=[16, 32, 48, 64],
            first_blocks=1,
            blocks=[1, 2, 1],
            num_stages=2,
            last_decoder=False,
            drop_path=0.0,
        ),
        num_classes="${..num_classes}",
        init_scale=0.1,
    ),
    num_classes=10,
    label_smoothing=0.1,
    mixup=0.1,
    cutmix=0.1,
    mix_prob=0.5,
)

_steps_count, _batch = 400, 64
dataloader = common.classification_loader(
    train="shapes_objects_train",
    test="shapes_objects_val",
    train_augmentations=L(_steps)(
        is_train=True, size=32, scale=[0.5, 1.0], auto_augment="", random_erasing=0.1
    ),
    test_augmentations=L(_steps)(is_train=False, size=32, test_resize=32),
    batch_size=_batch,
    workers=0,
)
optimizer = common.adamw(lr=0.002, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = common.cosine_after_warmup(max_iter=_steps_count, warmup_iters=40)
train = common.train(
    max_iter=_steps_count,
    eval_period=_steps_count // 2,
    best={"metric": "classification/top1"},
    seed=0,
    device="cpu",
    channels_last=True,
)
