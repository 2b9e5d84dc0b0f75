"""Auxiliary heads and positive queries of a recorded Co-Deformable DETR, from the memory to
detections, losses and gradients.
"""

import functools

import numpy as np
import pytest
import torch

from tests.modeling.detr import recorded
from tests.projects.codetr import recorded_detector as official

pytestmark = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")

EVAL, TRAIN = "eval_co_deformable_r50", "train_co_deformable_r50"
LIMITS = torch.tensor([[[256.0, 192.0, 256.0, 192.0]]])


@functools.cache
@torch.no_grad()
def maps():
    model = official.detector()
    return model.adapter(model.encode(official.images()))


def sampled(found, level):
    step = max(1, maps()[level].shape[2] // 8)
    return found[level][:, :, ::step, ::step]


def test_the_adapter():
    assert recorded.error(maps()[-1][:, ::4], official.recording(EVAL)["adapter_last"]) < 1e-4


@torch.no_grad()
def test_outputs_of_atss():
    found, file = official.detector().auxiliary_heads[1].predict(maps()), official.recording(EVAL)
    for level in range(5):
        assert (
            recorded.error(sampled(found.logits, level)[:, ::8], file[f"atss_cls_{level}"]) < 1e-4
        )
        assert recorded.error(sampled(found.deltas, level), file[f"atss_reg_{level}"]) < 1e-4
        assert recorded.error(sampled(found.centerness, level), file[f"atss_ctr_{level}"]) < 1e-4


@torch.no_grad()
def test_outputs_and_proposals_of_the_rpn():
    rpn, file = official.detector().auxiliary_heads[0].rpn, official.recording(EVAL)
    logits, deltas = rpn.predict(maps())
    for level in range(5):  # the official order of channels is ours
        assert recorded.error(sampled(logits, level), file[f"rpn_cls_{level}"]) < 1e-4
        assert recorded.error(sampled(deltas, level)[:, ::3], file[f"rpn_reg_{level}"]) < 1e-4
    proposals = rpn.propose(maps(), LIMITS)
    assert int(proposals.there.sum()) == file["rpn_nprop0"]
    assert recorded.error(proposals.boxes[0, :100], file["rpn_prop0"][:, :4]) < 5e-3
    assert recorded.error(proposals.scores[0, :100], file["rpn_prop0"][:, 4]) < 1e-5


@torch.no_grad()
def test_outputs_of_the_region_head():
    head, file = official.detector().auxiliary_heads[0], official.recording(EVAL)
    pooled = head.pool(maps(), head.rpn.propose(maps(), LIMITS).boxes[:, :20])
    logits, deltas = head.predict(pooled)
    assert recorded.error(pooled.mean(dim=(2, 3))[:, ::4], file["roi_feat_mean"]) < 1e-4
    assert recorded.error(logits[:, ::3], file["roi_cls"]) < 1e-4
    assert recorded.error(deltas[:, :16], file["roi_reg"]) < 1e-4


@pytest.mark.parametrize(("head", "name"), [(0, "rcnn"), (1, "atss")])
def test_detections(head, name):
    found = official.detector().auxiliary_heads[head].detect(maps(), [official.SIZE])[0][:50]
    file = official.recording(EVAL)
    assert recorded.error(found.pred_boxes.tensor.detach(), file[f"{name}_det0_box"]) < 5e-3
    assert recorded.error(found.scores, file[f"{name}_det0_score"]) < 1e-5
    assert (found.pred_classes.numpy() == file[f"{name}_det0_label"]).all()


@functools.cache
def training():
    """Losses, what was selected of each head, and the gradients' norms of what is trained after
    the encoder's first layers.
    """
    model, file = official.detector(), official.recording(TRAIN)
    with torch.no_grad():
        features = model.backbone(official.images().tensor)
        levels = model.neck([features[name] for name in model.in_features])
    memory = model.encoder(levels, torch.tensor([official.SIZE]).float(), official.SIZE)
    instances = official.instances(file)
    targets = model.build_targets(official.images(), instances)
    given = {}
    model.positive_queries.register_forward_pre_hook(lambda _, inputs: given.update(x=inputs[0]))
    losses = model.main_losses(memory, targets)
    losses |= model.collaborative_losses(memory, instances, targets)
    return losses, given["x"]


def test_positive_queries():
    file = official.recording(TRAIN)
    for head, found in enumerate(training()[1]):
        positive = found.positive[0].numpy()
        assert found.full
        assert recorded.error(found.boxes, file[f"aux{head}_coord"]) < 1e-5
        assert recorded.error(found.features[..., ::16], file[f"aux{head}_feat"]) < 1e-4
        assert (found.labels.numpy() == file[f"aux{head}_label"]).all()
        assert (positive == file[f"aux{head}_bbox_weight"][0]).all()
        targets = file[f"aux{head}_target"][0]
        assert np.abs(found.targets[0].numpy() - targets)[positive].max() < 1e-6


def test_all_losses():
    file, losses = official.recording(TRAIN), training()[0]
    expected = dict(zip(file["loss_names"].tolist(), file["loss_values"].tolist()))
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
    assert sum(losses.values()).item() == pytest.approx(float(file["loss_total"]), rel=1e-6)


@pytest.mark.parametrize("boxes_only", [False, True])
def test_gradients(boxes_only):
    """They show what is detached: proposals are, maps and regions' features are not."""
    model, file, losses = official.detector(), official.recording(TRAIN), training()[0]
    if boxes_only:
        losses = {k: v for k, v in losses.items() if "bbox" in k or "iou" in k}
    ours = {
        official.official(name): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("adapter", "positive_queries", "auxiliary_heads"))
    }
    ours["query_head.transformer.level_embeds"] = model.encoder.level_embedding
    names = "grad_norm_box" if boxes_only else "grad_norm"
    expected = dict(zip(file["grad_keys"].tolist(), file[names].tolist()))
    found = torch.autograd.grad(
        sum(losses.values()), list(ours.values()), retain_graph=True, allow_unused=True
    )
    largest = np.nanmax(list(expected.values()))
    compared = 0
    for name, gradient in zip(ours, found):
        if name not in expected:
            continue
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        if np.isnan(expected[name]):
            assert norm == 0, name
        elif expected[name] > 1e-6 * largest:
            compared += 1
            assert norm == pytest.approx(expected[name], rel=1e-3), name
    assert compared > 25
