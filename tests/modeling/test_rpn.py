"""Detectron2's RPN, as configs of this library use it: how its losses are normalised."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from d2dense import config
from tests.modeling import batches as b


def smooth_l1(x: torch.Tensor, beta: float) -> torch.Tensor:
    x = x.abs()
    return torch.where(x < beta, 0.5 * x**2 / beta, x - 0.5 * beta)


def test_losses_are_divided_by_the_sampled_anchors_as_in_mmdetection():
    """Where an image has as many anchors as are sampled; Detectron2 divides by the latter."""
    cfg = config.get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.RPN.IN_FEATURES = "StandardRPNHead", list(b.LEVELS)
    cfg.MODEL.RPN.SMOOTH_L1_BETA = 1 / 9
    shapes = {name: ShapeSpec(channels=b.CHANNELS, stride=s) for name, s in b.LEVELS.items()}
    torch.manual_seed(0)
    rpn = build_proposal_generator(cfg, shapes).train()
    torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.3)
    sampled = []
    label = rpn.label_and_sample_anchors
    rpn.label_and_sample_anchors = lambda *given: sampled.append(label(*given)) or sampled[-1]
    features = b.features()
    images = ImageList(torch.zeros(2, 3, b.SIZE, b.SIZE), [(b.SIZE, b.SIZE)] * 2)
    with EventStorage():
        _, losses = rpn(images, features, b.targets())

    logits, deltas = rpn.rpn_head(list(features.values()))
    anchors = torch.cat([a.tensor for a in rpn.anchor_generator(list(features.values()))])
    logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], 1)
    deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas], 1)
    labels, gt_boxes = (torch.stack(each) for each in sampled[0])
    number = (labels >= 0).sum()
    assert number == 512
    cls = -(logits.sigmoid().log() * (labels == 1) + (-logits).sigmoid().log() * (labels == 0))
    box = 0.0
    for n, r in (labels == 1).nonzero().tolist():
        target = rpn.box2box_transform.get_deltas(anchors[r][None], gt_boxes[n, r][None])[0]
        box = box + smooth_l1(deltas[n, r] - target, 1 / 9).sum()
    torch.testing.assert_close(losses["loss_rpn_cls"], cls.sum() / number)
    torch.testing.assert_close(losses["loss_rpn_loc"], box / number)
