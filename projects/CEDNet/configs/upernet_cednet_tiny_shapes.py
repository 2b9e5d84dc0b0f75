"""A small CEDNet UperNet for the generated shapes: in two minutes on a CPU it learns, from scratch,
the textures behind the shapes; telling the shapes apart takes longer (``train.max_iter``).
"""

from detectron2.config import LazyCall as L

from cednet import CEDNet
from d2dense.config import common, segmenters
from d2dense.data import augmentations

from .common.tiny_shapes import backbone as _backbone

_shapes = {"c2": (24, 4), "c3": (32, 8), "c4": (48, 16), "c5": (64, 32), "stage1_c3": (32, 8)}
model = segmenters.upernet(
    backbone=L(CEDNet)(trunk=_backbone.trunk, out_features=list(_shapes)),
    shapes=_shapes,
    auxiliary_feature="stage1_c3",
    num_classes=15,
    channels=32,
    auxiliary_channels=16,
    norm="BN",
    crop=[128, 128],
)

_steps = 600
_frame = {"min_size": [128], "max_size": 512}
dataloader = common.semantic_loader(
    train="shapes_train_sem_seg",
    test="shapes_val_sem_seg",
    train_augmentations=L(augmentations.semantic)(
        is_train=True,
        **_frame,
        crop_size=[128, 128],
        color_distortion=False,
        image_format="RGB",
    ),
    test_augmentations=L(augmentations.semantic)(is_train=False, **_frame),
    batch_size=8,
    workers=0,
    image_format="RGB",
)
optimizer = common.adamw(lr=0.004, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = common.poly(max_iter=_steps, power=0.9, warmup_iters=30, warmup_factor=0.01)
train = common.train(max_iter=_steps, seed=0, device="cpu", channels_last=True)
