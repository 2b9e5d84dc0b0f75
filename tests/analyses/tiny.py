"""Small detectors, and a picture."""

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from d2dense import config, projects
from d2dense.config import detr

DETR = "CEDNet/deformable_detr_cednet_tiny_shapes"
CO_DETR = "CoDETR/co_deformable_detr_tiny_shapes"
RETINANET = "CEDNet/retinanet_cednet_tiny_shapes"


def build(path):
    return config.build_model(config.load(path), device="cpu").eval()


def sample(size=(75, 90)):
    """A picture of noise, whose size is no multiple of a stride, with two objects."""
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 40.0, 50.0], [50.0, 5.0, 85.0, 40.0]]))
    objects.gt_classes = torch.tensor([1, 4])
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0))
    return {"image": image.to(torch.uint8), "instances": objects, "file_name": "noise.jpg"}


def collaborative(*heads):
    """Return a small Co-Deformable DETR with these auxiliary heads."""
    projects.import_all()
    from codetr import nodes

    backbone = config.load(DETR).model.backbone
    backbone.out_channels = 64  # of which group norm can make 32 groups on a map of one pixel
    node = detr.deformable_detr_plus_plus(
        backbone=backbone, in_features=["p3", "p4", "p5", "p6"], num_classes=10, channels=64
    )
    for part in (node.encoder, node.decoder):
        part.update(layers=2, heads=4, feedforward=64, dropout=0.0)
    node.queries.num_queries = 50
    return instantiate(nodes.collaborative(node, *heads)).eval()
