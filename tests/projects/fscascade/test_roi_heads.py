"""FSCascadeROIHeads against Detectron2's cascade and a slow reference, and its invariants."""

import pytest
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from d2dense.errors import UserError
from fscascade.roi_heads import test_score_modes as score_modes
from tests.projects.fscascade import builders as b
from tests.projects.fscascade.reference import SlowCascade

PLAIN = {"cfs": False, "lfs": False}
VARIANTS = {
    "both": {},
    "cfs": {"lfs": False},
    "lfs": {"cfs": False},
    "conv": {"cfs": False, "lfs": False, "conv_head": True},
    "cfs and conv": {"lfs": False, "conv_head": True},
    "avgpool, no relu": {"box_predictor": "avgpool", "lfs_relu_after_1x1": False},
    "plain": PLAIN,
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def assert_same(ours: list[Instances], theirs: list[Instances], *, exact: bool = False) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        assert x.get_fields().keys() == y.get_fields().keys()
        assert len(x) == len(y)
        for name, value in x.get_fields().items():
            other = y.get(name)
            value, other = getattr(value, "tensor", value), getattr(other, "tensor", other)
            if exact:
                assert torch.equal(value, other), name
            else:
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------ 1: equal to Detectron2's cascade


@pytest.mark.parametrize("masks", [False, True])
def test_sharing_off_is_bitwise_detectron2s_cascade(masks):
    theirs = b.heads(name="CascadeROIHeads", masks=masks)
    ours = b.heads(
        **PLAIN,
        masks=masks,
        scale_gradients=True,
        stage_loss_weights=[1.0, 1.0, 1.0],
        test_scores="ensemble_own_rois",
    )
    ours.load_state_dict(theirs.state_dict())
    gt = b.targets(masks=masks)
    expected, got = b.losses(theirs, gt=gt), b.losses(ours, gt=gt)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    sum(expected.values()).backward()
    sum(got.values()).backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert torch.equal(p.grad, q.grad), name
    assert_same(b.detections(ours), b.detections(theirs), exact=True)


def test_one_stage_is_bitwise_faster_rcnn():
    theirs = b.heads(name="StandardROIHeads", agnostic=False)
    ours = b.heads(num_stages=1, agnostic=False, **PLAIN)
    state = {
        name.replace("box_head.", "box_head.0.").replace("box_predictor.", "box_predictor.0."): v
        for name, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    expected, got = b.losses(theirs), b.losses(ours)
    assert {f"{name}_stage0" for name in expected} == got.keys()
    assert all(torch.equal(got[f"{name}_stage0"], value) for name, value in expected.items())
    assert_same(b.detections(ours), b.detections(theirs), exact=True)


@every_variant
def test_equals_a_slow_loop_over_stages_and_images(variant):
    ours = b.heads(**variant)
    slow = SlowCascade(ours)
    # weights 1, 1/2, 1/4 are applied to the slow losses here; its gradients are not scaled at all
    expected = b.losses(slow)
    for name, value in b.losses(ours).items():
        torch.testing.assert_close(
            value, expected[name] * 0.5 ** int(name[-1]), rtol=1e-5, atol=1e-6
        )
    ours.set_test_scores("ensemble_own_rois")
    assert_same(b.detections(ours), b.detections(slow))


@every_variant
def test_gradients_equal_the_slow_loops(variant):
    ours = b.heads(**variant)
    slow = SlowCascade(ours)
    parameters = list(ours.parameters())
    got = torch.autograd.grad(sum(b.losses(ours).values()), parameters)
    weighted = sum(v * 0.5 ** int(name[-1]) for name, v in b.losses(slow).items())
    for x, y in zip(got, torch.autograd.grad(weighted, parameters)):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


# ------------------------------------------------ 4, 7: who gets a gradient


def gradient_names(roi_heads, *names: str) -> set[str]:
    """Names of the parameters that these losses give a non-zero gradient."""
    with torch.no_grad():  # boxes stay near the ground truth, so each stage has foreground
        for predictor in roi_heads.box_predictor:
            predictor.bbox_pred.weight.normal_(std=0.01)
    losses = b.losses(roi_heads)
    roi_heads.zero_grad()
    sum(losses[name] for name in names).backward()
    return {name for name, p in roi_heads.named_parameters() if p.grad is not None and p.grad.any()}


def parameter_names(roi_heads, *prefixes: str) -> set[str]:
    return {name for name, _ in roi_heads.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("mode", ["recompute", "cached"])
def test_losses_reach_exactly_the_shared_modules(mode):
    heads = b.heads(lfs_mode=mode)
    assert gradient_names(heads, "loss_cls_stage2") == parameter_names(
        heads, "box_head.", "box_predictor.2.cls_score"
    )
    assert gradient_names(heads, "loss_box_reg_stage2") == parameter_names(
        heads, "loc_head.", "box_predictor.2.bbox_pred"
    )
    first = gradient_names(heads, "loss_cls_stage0", "loss_box_reg_stage0")
    assert first == parameter_names(heads, "box_head.0.", "loc_head.0.", "box_predictor.0.")


def test_without_sharing_a_stage_reaches_only_itself():
    heads = b.heads(cfs=False, lfs=False, conv_head=True)
    for k in range(3):
        reached = gradient_names(heads, f"loss_cls_stage{k}", f"loss_box_reg_stage{k}")
        own = (f"box_head.{k}.", f"loc_head.{k}.", f"box_predictor.{k}.")
        assert reached == parameter_names(heads, *own)


def test_boxes_between_stages_carry_no_gradient(monkeypatch):
    from fscascade import training

    seen = []
    pool = training.batch.pool_regions
    monkeypatch.setattr(
        training.batch, "pool_regions", lambda p, f, r: seen.append(r.boxes) or pool(p, f, r)
    )
    b.losses(b.heads())
    assert len(seen) == 3
    assert not any(boxes.requires_grad for boxes in seen)


def test_gradient_scaling_divides_what_reaches_the_pyramid():
    grads = []
    for scale in (False, True):
        feats = {name: f.requires_grad_() for name, f in b.features().items()}
        sum(b.losses(b.heads(scale_gradients=scale), feats=feats).values()).backward()
        grads.append(feats["p2"].grad)
    torch.testing.assert_close(grads[0], 3 * grads[1])
    assert grads[0].any()


# ------------------------------------------------ 6: permutation and batching


@pytest.mark.parametrize("mode", score_modes(3))
@torch.no_grad()
def test_permuting_regions_and_batching_images_change_nothing(mode):
    heads, feats, props = b.heads(test_scores=mode).eval(), b.features(), b.proposals()
    together = b.detections(heads, feats=feats, props=props)
    for n, prop in enumerate(props):
        alone = {name: f[n : n + 1] for name, f in feats.items()}
        order = torch.randperm(len(prop), generator=torch.Generator().manual_seed(n))
        assert_same(b.detections(heads, feats=alone, props=[prop]), together[n : n + 1])
        assert_same(b.detections(heads, feats=alone, props=[prop[order]]), together[n : n + 1])
    assert all(len(found) for found in together)


# ------------------------------------------------ 7: emptiness


@every_variant
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("proposal_counts", "target_counts"),
    [((40, 30), (4, 0)), ((40, 30), (0, 0)), ((40, 0), (4, 0)), ((0, 0), (0, 0)), ((0, 3), (0, 2))],
)
def test_empty_images_give_finite_losses_and_a_gradient_for_every_parameter(
    variant, masks, proposal_counts, target_counts
):
    heads = b.heads(**variant, masks=masks)
    gt = b.targets(target_counts, masks=masks)
    losses = b.losses(heads, props=b.proposals(proposal_counts), gt=gt)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in heads.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mode", score_modes(3))
@pytest.mark.parametrize("counts", [(0, 30), (0, 0)])
def test_images_without_proposals_give_empty_results(mode, counts):
    heads = b.heads(test_scores=mode, masks=True)
    found = b.detections(heads, props=b.proposals(counts))
    assert [len(f) > 0 for f in found] == [count > 0 for count in counts]
    assert all(f.has("pred_boxes") and f.has("pred_masks") for f in found)


@pytest.mark.parametrize("num_classes", [1, 1000])
@every_variant
def test_one_class_and_a_thousand_classes(variant, num_classes):
    heads = b.heads(**variant, num_classes=num_classes)
    losses = b.losses(heads, gt=b.targets(num_classes=num_classes))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    found = b.detections(heads)
    assert 0 <= found[0].pred_classes.min() <= found[0].pred_classes.max() < num_classes


def test_boxes_that_collapse_are_dropped_in_training():
    heads = b.heads()
    with torch.no_grad():  # every box of stage 1 leaves the image, so stages 2 and 3 get none
        heads.box_predictor[0].bbox_pred.bias[:2] = 1e6
    losses = b.losses(heads)
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_cls_stage0"] > 0
    assert losses["loss_cls_stage1"] == losses["loss_cls_stage2"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in heads.parameters())


def test_cached_features_follow_their_regions_when_some_are_dropped(monkeypatch):
    """Shift about half of the boxes out of the image: the rest must keep their own features."""
    heads = b.heads(lfs_mode="cached")
    with torch.no_grad():
        heads.box_predictor[0].bbox_pred.weight.normal_(std=3.0)
    calls, sizes = [], []
    forward = heads.loc_head.forward

    def spy(x, stage, previous):
        out = forward(x, stage, previous)
        calls.append((previous, out))
        sizes.append(len(x))
        return out

    monkeypatch.setattr(heads.loc_head, "forward", spy)
    b.losses(heads)
    assert sizes[0] > sizes[1] > 0
    kept = {tuple(row) for row in calls[0][1].flatten(1).tolist()}
    assert all(tuple(row) in kept for row in calls[1][0].flatten(1).tolist())


# ------------------------------------------------ 8 and the inference modes


def test_with_one_stage_all_modes_coincide():
    heads = b.heads(num_stages=1)
    results = []
    for mode in score_modes(1):
        heads.set_test_scores(mode)
        results.append(b.detections(heads))
    for other in results[1:]:
        assert_same(other, results[0], exact=True)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_number_of_stages_comes_from_the_config(num_stages):
    heads = b.heads(num_stages=num_stages)
    assert len(b.losses(heads)) == 2 * num_stages
    heads.set_test_scores(f"stage{num_stages}")
    last = b.detections(heads)
    heads.set_test_scores("last")
    assert_same(b.detections(heads), last, exact=True)


@every_variant
@torch.no_grad()
def test_inference_modes_equal_their_definitions(variant):
    """Probabilities and boxes of each mode, from the slow reference's stages."""
    heads, feats, props = b.heads(**variant).eval(), b.features(), b.proposals()
    slow = SlowCascade(heads).eval()
    levels = [feats[name] for name in heads.box_in_features]
    logits, boxes, inputs = [], [], props
    for k in range(3):
        prediction = slow._run_stage(levels, inputs, k)
        logits.append(prediction[0])
        boxes.append(heads.box_predictor[k].predict_boxes(prediction, inputs))
        last_inputs = inputs
        inputs = slow._create_proposals_from_boxes(boxes[-1], [p.image_size for p in props])
    own = [scores.softmax(1) for scores in logits]
    on_last = [slow._run_stage(levels, last_inputs, k)[0].softmax(1) for k in range(3)]
    definitions = {
        "stage1": (own[0], boxes[0]),
        "stage2": (own[1], boxes[1]),
        "stage3": (own[2], boxes[2]),
        "last": (own[2], boxes[2]),
        "ensemble_own_rois": (sum(own) / 3, boxes[2]),
        "ensemble_last_rois": (sum(on_last) / 3, boxes[2]),
    }
    assert definitions.keys() == set(score_modes(3))
    every = heads.detect_all_stages(feats, props)
    for mode, (probs, mode_boxes) in definitions.items():
        expected = heads._detections(torch.cat(list(mode_boxes)), probs, props)
        heads.set_test_scores(mode)
        assert_same(b.detections(heads), expected)
        if mode != "last":
            assert_same(every[mode], expected)
    assert every.keys() == definitions.keys() - {"last"}


def test_masks_are_predicted_on_the_boxes_of_the_chosen_stage():
    heads = b.heads(masks=True)
    for mode in ("stage1", "last"):
        heads.set_test_scores(mode)
        found = b.detections(heads)
        boxes = [Instances(f.image_size, **f.get_fields()) for f in found]
        again = heads.forward_with_given_boxes(b.features(), boxes)
        assert_same(again, found)


# ------------------------------------------------ statistics and errors


def test_region_counts_are_logged_every_step_and_accuracies_now_and_then():
    heads = b.heads()
    with EventStorage(0) as storage:
        torch.manual_seed(0)
        heads.train()(None, b.features(), b.proposals(), b.targets())
        logged = storage.latest()
    for k in range(3):
        total = sum(logged[f"stage{k}/roi_head/num_{kind}_samples"][0] for kind in ("fg", "bg"))
        assert 0 < total <= 48
        assert 0 <= logged[f"stage{k}/fast_rcnn/cls_accuracy"][0] <= 1
    with EventStorage(7) as storage:
        heads(None, b.features(), b.proposals(), b.targets())
        assert "stage0/roi_head/num_fg_samples" in storage.latest()
        assert "stage0/fast_rcnn/cls_accuracy" not in storage.latest()


def test_user_mistakes_are_named():
    with pytest.raises(UserError, match=r"TEST_SCORES is 'stage4'; expected one of last, stage1"):
        b.heads(test_scores="stage4")
    with pytest.raises(UserError, match="STAGE_LOSS_WEIGHTS has 2 entries, but the cascade has 3"):
        b.heads(stage_loss_weights=[1.0, 0.5])
    with pytest.raises(UserError, match="CLS_AGNOSTIC_BBOX_REG is False"):
        b.heads(agnostic=False)
    with pytest.raises(UserError, match="flatten, avgpool"):
        b.heads(box_predictor="mean")
