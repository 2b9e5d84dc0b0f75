"""Our parts in the place of the official ones: a recorded Co-Deformable DETR without its auxiliary
heads, from the image to the losses.
"""

import functools
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances

from d2dense.modeling.detr import HungarianMatcher, SinePositions, build_targets
from d2dense.modeling.detr.memory import centres, padding_masks, valid_ratios
from tests.modeling.detr import recorded

pytestmark = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


@functools.cache
def recording(name):
    return np.load(recorded.FOLDER / f"{name}.npz")


@functools.cache
def detector():
    return recorded.detector()


def images():
    return ImageList(recorded.image(), [(192, 256)])


@functools.cache
@torch.no_grad()
def memory():
    return detector().encode(images())


@functools.cache
@torch.no_grad()
def predictions():
    queries = detector().queries(memory())
    return queries.proposals, *detector().predict(queries, memory())


def instances(file, image=0):
    found = Instances((192, 256))
    found.gt_boxes = Boxes(torch.from_numpy(file[f"gt_box{image}"]))
    found.gt_classes = torch.from_numpy(file[f"gt_label{image}"]).long()
    return found


def test_the_neck():
    with torch.no_grad():
        maps = detector().neck(list(detector().backbone(recorded.image()).values()))
    for level, found in enumerate(maps):
        step = max(1, found.shape[2] // 8)
        expected = recording("eval_co_deformable_r50")[f"neck_{level}"]
        assert recorded.error(found[:, ::16, ::step, ::step], expected) < 1e-4


def test_the_encoder():
    tokens = memory().tokens
    step = tokens.shape[1] // 60
    expected = recording("eval_co_deformable_r50")["memory"]
    assert recorded.error(tokens[:, ::step, ::8], expected) < 2e-5


def test_the_proposals():
    proposals, file = predictions()[0], recording("eval_co_deformable_r50")
    scores = proposals.scores
    assert recorded.error(scores[:, :: scores.shape[1] // 500], file["enc_score"]) < 1e-4
    assert (proposals.index.numpy() == file["enc_topk_index"]).all()
    assert recorded.error(proposals.top_scores, file["enc_topk_score"]) < 1e-4
    assert recorded.error(proposals.boxes, file["enc_topk_box"]) < 1e-5


def test_the_decoder_and_its_heads():
    _, logits, boxes = predictions()
    file = recording("eval_co_deformable_r50")
    assert recorded.error(boxes[:, :, ::3], file["dec_box"]) < 1e-5
    assert recorded.error(logits[:, :, ::15, ::4], file["dec_cls"]) < 1e-4
    assert recorded.error(logits[-1, :, :12], file["dec_cls_last"]) < 1e-4


def test_the_detections():
    _, logits, boxes = predictions()
    found = detector().select(logits[-1], boxes[-1], images())[0]
    file = recording("eval_co_deformable_r50")
    assert len(found) == 100
    assert recorded.error(found.pred_boxes.tensor[:50], file["det0_box"]) < 5e-3
    assert recorded.error(found.scores[:50], file["det0_score"]) < 1e-5
    assert (found.pred_classes[:50].numpy() == file["det0_label"]).all()


def test_the_matches():
    file = recording("train_co_deformable_r50")
    proposals, logits, boxes = predictions()
    given = build_targets([instances(file)], torch.device("cpu"))
    encoder = detector().queries.encoder_predictions(proposals)
    assert encoder.binary
    binary = given._replace(classes=given.classes * 0)
    decoded, encoded = HungarianMatcher().match(
        [(logits, boxes, given), (encoder.logits[None], encoder.boxes[None], binary)]
    )
    found = {f"dec{i}": decoded.queries[i, 0] for i in range(6)} | {"enc": encoded.queries[0, 0]}
    for name, queries in found.items():
        query, gt = file[f"match/{name}_img0"]
        assert dict(enumerate(queries.numpy())) == dict(zip(gt - 1, query)), name


# official parameters that no loss of an auxiliary branch reaches
ALONE = {theirs: ours for ours, theirs in recorded.QUERIES.items()}


def test_the_losses_and_their_gradients():
    file = recording("train_co_deformable_r50")
    losses = detector().losses(images(), [instances(file)])
    expected = dict(zip(file["loss_names"].tolist(), file["loss_values"].tolist()))
    assert len(losses) == 21
    for name, value in losses.items():
        assert float(value.detach()) == pytest.approx(expected[name], rel=1e-5), name
    of_boxes = [loss for name, loss in losses.items() if "bbox" in name or "iou" in name]
    parameters = dict(detector().queries.named_parameters())
    keys = [key.removeprefix("query_head.") for key in file["grad_keys"].tolist()]
    for total, norms in ((losses.values(), "grad_norm"), (of_boxes, "grad_norm_box")):
        gradients = torch.autograd.grad(
            sum(total), parameters.values(), retain_graph=True, allow_unused=True
        )
        found = dict(zip(parameters, gradients))
        known, seen = dict(zip(keys, file[norms].tolist())), 0
        largest = float(np.nanmax(file[norms]))
        for theirs, value in known.items():
            prefix = next((part for part in ALONE if theirs.startswith(f"{part}.")), None)
            if prefix is None:
                continue
            gradient = found[ALONE[prefix] + theirs.removeprefix(prefix)]
            seen += 1
            if math.isnan(value):
                assert gradient is None or not gradient.any(), theirs
            elif value > 1e-6 * largest:
                assert float(gradient.norm()) == pytest.approx(value, rel=1e-3), theirs
        assert seen == len(parameters)


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
    target = Instances((192, 256))
    target.gt_boxes = Boxes(torch.from_numpy(units["cost_gt_box"]).float())
    target.gt_classes = torch.from_numpy(units["cost_gt_label"]).long()
    given = build_targets([target], torch.device("cpu"))
    weights = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
    parts = {"cost_cls": "class_weight", "cost_l1": "l1_weight", "cost_giou": "giou_weight"}
    for part, name in parts.items():
        only = {each: value if each == name else 0.0 for each, value in weights.items()}
        cost = HungarianMatcher(**only).cost(logits[None, None], boxes[None, None], given)
        assert recorded.error(cost[0, 0], units[part]) < 1e-5
    matches = HungarianMatcher()(logits[None, None], boxes[None, None], given)
    expected = {gt - 1: query for query, gt in enumerate(units["cost_assign"]) if gt > 0}
    assert dict(enumerate(matches.queries[0, 0].tolist())) == expected
