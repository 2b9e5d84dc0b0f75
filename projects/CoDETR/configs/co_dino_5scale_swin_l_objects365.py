"""Pre-training on Objects365, 22 epochs: Co-DINO on Swin-L. The recipe is not published; what is
not known is that of COCO.

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin at 384 pixels.
The files are expected as $DETECTRON2_DATASETS/objects365/{train,val}.json and .../images; other
places by ``datasets.train.json``, ``datasets.train.images``, ``datasets.val.json``, ....
"""

from codetr import nodes

from .common.recipes import OBJECTS365_IMAGES, adamw, coco, objects365, schedule

model = nodes.co_dino(nodes.swin("large", drop_path=0.3), num_classes=365)
datasets = objects365()
dataloader = coco()
optimizer = adamw()
train, lr_multiplier = schedule(22, 20, init="", images=OBJECTS365_IMAGES)
