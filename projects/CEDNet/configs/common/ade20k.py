"""Data, optimizer and schedule of the official segmenters: ADE20K, 160,000 iterations of 16 images,
crops of 512 pixels; tested in windows (``model.inference.multi_scale=true`` for several scales).
"""

from detectron2.config import LazyCall as L

from cednet import CEDNet, NextFamily
from d2dense.config import common, segmenters
from d2dense.data import augmentations
from d2dense.modeling import TimmBackbone

_ITERATIONS = 160_000
_frame = {"min_size": [512], "max_size": 2048}

dataloader = common.semantic_loader(
    train="ade20k_sem_seg_train",
    test="ade20k_sem_seg_val",
    train_augmentations=L(augmentations.semantic)(
        is_train=True,
        **_frame,
        scale_range=[0.5, 2.0],
        crop_size=[512, 512],
        single_category_max_area=0.75,
        image_format="RGB",
    ),
    test_augmentations=L(augmentations.semantic)(is_train=False, **_frame),
    batch_size=16,
    image_format="RGB",
)
optimizer = common.adamw(lr=1e-4, weight_decay=0.05, weight_decay_1d=0.0, layer_decay=0.9)
lr_multiplier = common.poly(max_iter=_ITERATIONS, power=1.0, warmup_iters=1500, warmup_factor=1e-6)
train = common.train(max_iter=_ITERATIONS, amp={"enabled": True}, channels_last=True)


def upernet(trunk, *, widths, stages, drop_path):
    """UperNet on a CEDNet-NeXt; the auxiliary classifier takes C3 of the second-last stage."""
    trunk.family = L(NextFamily)(layer_scale=1.0)
    trunk.drop_path = drop_path
    auxiliary = f"stage{stages - 1}_c3"
    shapes = dict(zip(("c2", "c3", "c4", "c5"), zip(widths, (4, 8, 16, 32))))
    shapes[auxiliary] = (widths[1], 8)
    return segmenters.upernet(
        backbone=L(CEDNet)(trunk=trunk, out_features=list(shapes)),
        shapes=shapes,
        auxiliary_feature=auxiliary,
    )


def upernet_convnext(name, *, width, drop_path):
    """UperNet on a ConvNeXt of timm whose first stage has ``width`` channels."""
    shapes = {f"res{k + 2}": (width * 2**k, 4 * 2**k) for k in range(4)}
    return segmenters.upernet(
        backbone=L(TimmBackbone)(name=name, drop_path_rate=drop_path, out_norm="LN"),
        shapes=shapes,
        auxiliary_feature="res4",
    )
