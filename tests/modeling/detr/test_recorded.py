"""Our parts in the place of the official ones: a recorded Co-Deformable DETR without its auxiliary
heads, from the image to the losses.
"""

import functools

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2dense.modeling.detr import DETRCriterion, HungarianMatcher, SinePositions, build_targets
from d2dense.modeling.detr.memory import centres, padding_masks, valid_ratios
from tests.modeling.detr import recorded

pytestmark = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


@functools.cache
def recording(name):
    return np.load(recorded.FOLDER / f"{name}.npz")


@functools.cache
@torch.no_grad()
def memory():
    maps = recorded.neck()(list(recorded.backbone()(recorded.image()).values()))
    return maps, recorded.encoder()(maps, torch.tensor([[192.0, 256.0]]), (192, 256))


@functools.cache
@torch.no_grad()
def predictions():
    _, encoded = memory()
    queries, scores, index = recorded.proposal_queries(encoded)
    heads = recorded.heads()
    states, references = recorded.decoder()(queries, encoded, heads.predict_boxes)
    layers = range(len(states))
    logits = torch.stack([heads.classes[i](states[i]) for i in layers])
    boxes = torch.stack([heads.predict_boxes(i, states[i], references[i]) for i in layers])
    return scores, index, logits, boxes


def test_the_neck():
    for level, found in enumerate(memory()[0]):
        step = max(1, found.shape[2] // 8)
        expected = recording("eval_co_deformable_r50")[f"neck_{level}"]
        assert recorded.error(found[:, ::16, ::step, ::step], expected) < 1e-4


def test_the_encoder():
    tokens = memory()[1].tokens
    step = tokens.shape[1] // 60
    expected = recording("eval_co_deformable_r50")["memory"]
    assert recorded.error(tokens[:, ::step, ::8], expected) < 2e-5


def test_the_decoder_and_its_heads():
    scores, index, logits, boxes = predictions()
    file = recording("eval_co_deformable_r50")
    assert recorded.error(scores[:, :: scores.shape[1] // 500], file["enc_score"]) < 1e-4
    assert (index.numpy() == file["enc_topk_index"]).all()
    assert recorded.error(boxes[:, :, ::3], file["dec_box"]) < 1e-5
    assert recorded.error(logits[:, :, ::15, ::4], file["dec_cls"]) < 1e-4


def targets(file):
    instances = Instances((192, 256))
    instances.gt_boxes = Boxes(torch.from_numpy(file["gt_box0"]))
    instances.gt_classes = torch.from_numpy(file["gt_label0"]).long()
    return build_targets([instances], torch.device("cpu"))


def test_matches_and_losses():
    file = recording("train_co_deformable_r50")
    _, _, logits, boxes = predictions()
    given = targets(file)
    matches = HungarianMatcher()(logits, boxes, given)
    for layer in range(6):
        query, gt = file[f"match/dec{layer}_img0"]
        expected = dict(zip(gt - 1, query))
        assert dict(enumerate(matches.queries[layer, 0].numpy())) == expected
    losses = DETRCriterion(matcher=HungarianMatcher())(logits, boxes, given)
    recorded_losses = dict(zip(file["loss_names"].tolist(), file["loss_values"].tolist()))
    assert len(losses) == 18
    for name, value in losses.items():
        assert float(value) == pytest.approx(recorded_losses[name], rel=1e-5), name


# ------------------------------------------------ single functions


def three_quarters(shapes):
    """Masks of two images, of which the second fills three quarters of rows and columns."""
    masks = []
    for h, w in shapes:
        mask = torch.zeros(2, h, w, dtype=torch.bool)
        mask[1, int(0.75 * h) :] = True
        mask[1, :, int(0.75 * w) :] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize(
    ("name", "temperature", "offset"), [("pe_deform", 10000, -0.5), ("pe_dino", 20, 0.0)]
)
def test_sine_positions(name, temperature, offset):
    mask = torch.zeros(2, 12, 16, dtype=torch.bool)
    mask[1, 10:], mask[1, :, 13:] = True, True
    found = SinePositions(channels=256, temperature=temperature, offset=offset)(mask)
    assert recorded.error(found[:, ::4, ::3, ::3], np.load(recorded.UNITS)[name]) < 1e-5


def test_reference_points_and_valid_ratios():
    shapes, units = ((12, 16), (6, 8)), np.load(recorded.UNITS)
    ratios = torch.stack([valid_ratios(mask) for mask in three_quarters(shapes)], dim=1)
    assert recorded.error(ratios, units["valid_ratios"]) < 1e-6
    assert recorded.error(centres(shapes, ratios), units["enc_reference_points"]) < 1e-6


def test_padding_masks_are_the_nearest_pixels():
    sizes, batch = ((37, 50), (64, 41), (1, 1)), (64, 50)
    shapes = ((8, 7), (4, 4), (2, 2), (1, 1), (13, 9))
    found = padding_masks(torch.tensor(sizes, dtype=torch.float32), batch, shapes)
    pixels = torch.ones(3, *batch)
    for image, (h, w) in enumerate(sizes):
        pixels[image, :h, :w] = 0
    for shape, mask in zip(shapes, found):
        whole = torch.nn.functional.interpolate(pixels[:, None], size=shape, mode="nearest")
        assert torch.equal(mask, whole[:, 0] > 0)
        assert not mask[:, 0, 0].any()


def test_costs():
    units = np.load(recorded.UNITS)
    g = torch.Generator().manual_seed(19)
    boxes = torch.rand(15, 4, generator=g) * 0.5 + 0.2
    logits = torch.randn(15, 80, generator=torch.Generator().manual_seed(20))
    instances = Instances((192, 256))
    instances.gt_boxes = Boxes(torch.from_numpy(units["cost_gt_box"]).float())
    instances.gt_classes = torch.from_numpy(units["cost_gt_label"]).long()
    given = build_targets([instances], torch.device("cpu"))
    weights = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
    parts = {"cost_cls": "class_weight", "cost_l1": "l1_weight", "cost_giou": "giou_weight"}
    for part, name in parts.items():
        only = {each: value if each == name else 0.0 for each, value in weights.items()}
        cost = HungarianMatcher(**only).cost(logits[None, None], boxes[None, None], given)
        assert recorded.error(cost[0, 0], units[part]) < 1e-5
    matches = HungarianMatcher()(logits[None, None], boxes[None, None], given)
    expected = {gt - 1: query for query, gt in enumerate(units["cost_assign"]) if gt > 0}
    assert dict(enumerate(matches.queries[0, 0].tolist())) == expected
