"""FSCascade on CEDNet-NeXt-T with the recipe of CEDNet's cascade: COCO, 36 epochs of 16 images,
large-scale jitter with copy-paste of boxes (in neither paper).

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from d2dense import model_zoo

from .common.fscascade_r50_fpn import model

_cednet = model_zoo.get_config("CEDNet/cascade_mask_rcnn_cednet_next_t")
model.backbone = _cednet.model.backbone
for _key in ("pixel_mean", "pixel_std", "input_format"):
    model[_key] = _cednet.model[_key]
dataloader, optimizer, lr_multiplier, train = (
    _cednet[_key] for _key in ("dataloader", "optimizer", "lr_multiplier", "train")
)
dataloader.train.mapper.update(use_instance_mask=False, recompute_boxes=False)
