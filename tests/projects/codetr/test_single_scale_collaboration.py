"""Conditional DETR and DAB-DETR with auxiliary heads: the whole loss, and inference without."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from torch import nn

from codetr import nodes
from codetr.meta_arch import CoDETR
from d2dense.config import single_scale_detr

CLASSES, C = 3, 32


class Cells(Backbone):
    """A map of stride 32."""

    size_divisibility = 32

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 8, 32, stride=32)

    def forward(self, x):
        return {"res5": self.mix(x)}

    def output_shape(self):
        return {"res5": ShapeSpec(channels=8, stride=32)}


def base(kind):
    build = getattr(single_scale_detr, f"{kind}_detr")
    node = build(backbone=nn.Identity(), widths={"res5": 8}, num_classes=CLASSES, channels=C)
    for part in (node.encoder, node.decoder):
        part.update(heads=4, feedforward=32, layers=2, dropout=0.0)
    node.queries.num_queries = 7
    return node


def build(kind, *names):
    torch.manual_seed(0)
    node = nodes.collaborative(base(kind), *names, points=kind == "conditional", random=False)
    for head in node.get("auxiliary_heads", ()):
        if "hidden" in head:
            head.hidden = 16
    model = instantiate(node)
    model.backbone = Cells()
    with torch.no_grad():  # an untrained box head says the same for every query
        model.heads.boxes[0].layers[-1].weight.normal_(std=0.2)
    return model


def image(height, width, seed=0, boxes=2):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=g) * 40
    target = Instances((height, width))
    target.gt_boxes = Boxes(torch.cat([corner, corner + 30], dim=1))
    target.gt_classes = torch.arange(boxes) % CLASSES
    pixels = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    return {"image": pixels, "instances": target, "height": height, "width": width}


both = pytest.mark.parametrize("kind", ["conditional", "dab"])


@both
@pytest.mark.parametrize("counts", [(2, 1), (0, 2), (0, 0)])
def test_losses_reach_every_parameter(kind, counts):
    model = build(kind, "faster_rcnn", "atss").train()
    losses = model([image(96, 128 - 9 * i, i, count) for i, count in enumerate(counts)])
    for head in (0, 1):
        for part in ("cls", "bbox", "iou"):
            assert {f"loss_{part}_aux{head}", f"d0.loss_{part}_aux{head}"} <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == free


@both
def test_heads_in_one_pass_or_one_by_one(kind):
    model = build(kind, "atss", "atss").train()
    with torch.no_grad():  # two heads that differ
        model.auxiliary_heads[0].apply(shaken)
    batch = [image(96, 128), image(70, 90, 1)]
    together = model(batch)
    model.one_pass = False
    alone = model(batch)
    assert set(together) == set(alone)
    for name, loss in together.items():
        assert torch.allclose(loss, alone[name], rtol=1e-4, atol=1e-5), name


@both
def test_positive_queries_start_from_boxes_or_their_centres(kind):
    model = build(kind, "atss").train()
    seen, chosen = [], []
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.positive_queries.register_forward_pre_hook(lambda _, given: chosen.extend(given[0]))
    model([image(96, 128), image(70, 90, 1)])
    (_, positive), (head,) = seen, chosen
    assert torch.equal(positive.references, head.boxes[..., : {"conditional": 2, "dab": 4}[kind]])
    embedded = model.positive_queries.embeddings[0](head.boxes.clamp(1e-5, 1 - 1e-5))
    position = embedded[..., :C] + model.positive_queries.head_embedding[0]
    content = embedded[..., C:] + model.positive_queries.features[0](head.features)
    assert torch.allclose(positive.position, position, atol=1e-5)
    assert torch.allclose(positive.content, content, atol=1e-5)


def shaken(module):
    if isinstance(module, nn.Conv2d):
        module.weight.add_(0.2 * torch.randn_like(module.weight))


@both
def test_inference_is_the_base_detectors(kind):
    model, plain = build(kind, "atss").eval(), build(kind).eval()
    assert isinstance(plain, CoDETR)
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state)
    given = [image(96, 128), image(70, 90, 1)]
    with torch.no_grad():
        for ours, theirs in zip(model(given), plain(given)):
            ours, theirs = ours["instances"], theirs["instances"]
            assert torch.equal(ours.scores, theirs.scores)
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
