"""FlexibleCascadeROIHeads against Detectron2's cascade, and against a slow one with its options."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.ops import batched_nms, generalized_box_iou

from d2dense import config as configs
from d2dense.errors import UserError
from d2dense.modeling import cascade
from tests.modeling import batches as b
from tests.modeling.waiting import OpCounter

CLASSES = 5
# what the reference says of CEDNet's Cascade Mask R-CNN
MANY = {
    "agnostic": False,
    "stage_loss_weights": [1.0, 0.5, 0.25],
    "scale_gradients": False,
    "score_average": "logits",
    "loss": "giou",
    "loss_weight": 10.0,
}
PER_STAGE_MASKS = {"masks": True, "per_stage": True}


def config(
    *,
    name: str = "FlexibleCascadeROIHeads",
    agnostic: bool = True,
    masks: bool = False,
    per_stage: bool = False,
    loss: str = "smooth_l1",
    loss_weight: float = 1.0,
    num_conv: int = 0,
    norm: str = "",
    **cascade_keys,
):
    cfg = configs.get_cfg()
    model = cfg.MODEL
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = name, list(b.LEVELS)
    model.ROI_HEADS.NUM_CLASSES, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = CLASSES, 48
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    head = model.ROI_BOX_HEAD
    head.NAME, head.NUM_FC, head.FC_DIM, head.POOLER_RESOLUTION = "FastRCNNConvFCHead", 1, 16, 5
    head.NUM_CONV, head.CONV_DIM, head.NORM = num_conv, 8, norm
    head.CLS_AGNOSTIC_BBOX_REG = agnostic
    head.BBOX_REG_LOSS_TYPE, head.BBOX_REG_LOSS_WEIGHT = loss, loss_weight
    model.MASK_ON, model.ROI_MASK_HEAD.PER_STAGE = masks, per_stage
    mask = model.ROI_MASK_HEAD
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM = "MaskRCNNConvUpsampleHead", 1, 8
    mask.POOLER_RESOLUTION = 4
    for key, value in cascade_keys.items():
        model.ROI_BOX_CASCADE_HEAD[key.upper()] = value
    return cfg


def heads(seed: int = 0, **settings):
    """Return seeded tiny heads; weights are enlarged so that the cascade moves its boxes."""
    torch.manual_seed(seed)
    shapes = {name: ShapeSpec(channels=b.CHANNELS, stride=s) for name, s in b.LEVELS.items()}
    built = build_roi_heads(config(**settings), shapes)
    for predictor in built.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    for module in getattr(built, "mask_head", torch.nn.Module()).modules():
        if hasattr(module, "predictor"):
            torch.nn.init.normal_(module.predictor.weight, std=0.3)
    return built


def losses(roi_heads, *, props=None, gt=None, masks: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    props = b.proposals() if props is None else props
    gt = b.targets(masks=masks) if gt is None else gt
    with EventStorage(1):
        return roi_heads.train()(None, b.features(), props, gt)[1]


@torch.no_grad()
def detections(roi_heads) -> list[Instances]:
    return roi_heads.eval()(None, b.features(), b.proposals())[0]


def tensors(instances: Instances) -> dict[str, torch.Tensor]:
    return {k: getattr(v, "tensor", v) for k, v in instances.get_fields().items()}


# ------------------------------------------------ the defaults are Detectron2's


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_defaults_are_bitwise_detectron2s_cascade(masks, loss):
    theirs = heads(name="CascadeROIHeads", masks=masks, loss=loss)
    ours = heads(masks=masks, loss=loss)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected, got = losses(theirs, masks=masks), losses(ours, masks=masks)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    sum(expected.values()).backward()
    sum(got.values()).backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert torch.equal(p.grad, q.grad), name
    for x, y in zip(detections(ours), detections(theirs)):
        assert len(x) > 0
        x, y = tensors(x), tensors(y)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


# ------------------------------------------------ a slow, obvious cascade with the options


class SlowCascade:
    """The stages of one image at a time, with everything computed for every class."""

    def __init__(self, roi_heads, weights=(1.0, 0.5, 0.25)):
        self.heads, self.weights = roi_heads, weights

    def stage(self, features, boxes, k):
        """Logits, and boxes of every class (R, K, 4)."""
        x = self.heads.box_pooler(features, [Boxes(boxes)])
        x = self.heads.box_head[k](x)
        predictor = self.heads.box_predictor[k]
        deltas = predictor.bbox_pred(x).view(-1, CLASSES, 4)
        each = [
            predictor.box2box_transform.apply_deltas(deltas[:, c], boxes) for c in range(CLASSES)
        ]
        return predictor.cls_score(x), torch.stack(each, dim=1)

    @torch.no_grad()
    def detect(self, features, boxes, size):
        all_logits = []
        for k in range(3):
            logits, by_class = self.stage(features, boxes, k)
            all_logits.append(logits)
            if k < 2:
                best = logits[:, :CLASSES].argmax(1).tolist()
                boxes = torch.stack([by_class[r, c] for r, c in enumerate(best)])
                boxes = boxes.clamp(0, size)
        scores = torch.stack(all_logits).mean(0).softmax(1)[:, :CLASSES]
        by_class = by_class.clamp(0, size).reshape(-1, 4)
        classes = torch.arange(CLASSES).repeat(len(scores))
        keep = batched_nms(by_class, scores.reshape(-1), classes, 0.5)[:100]
        return by_class[keep], scores.reshape(-1)[keep], classes[keep]

    def losses(self, features, samples, targets):
        """Losses per stage, from the sampled regions of stage 1 (boxes, classes, gt boxes, rows)
        per image.
        """
        found = {}
        for k in range(3):
            logits, giou, masks, count = [], 0.0, [], 0
            for n, (boxes, classes, gt_boxes, rows) in enumerate(samples):
                maps = [f[n : n + 1] for f in features]
                scores, by_class = self.stage(maps, boxes, k)
                logits.append(F.cross_entropy(scores, classes, reduction="sum"))
                count += len(boxes)
                refined = []
                for r, c in enumerate(classes.tolist()):
                    if c < CLASSES:
                        pair = by_class[r, c][None], gt_boxes[r][None]
                        giou = giou + (1 - generalized_box_iou(*pair)).sum()
                        masks.append((maps, boxes[r], c, targets[n].gt_masks[int(rows[r])], k))
                    else:
                        c = int(scores[r, :CLASSES].argmax())
                    refined.append(by_class[r, c].detach().clamp(0, b.SIZE))
                samples[n] = self.label(torch.stack(refined), targets[n], k + 1)
            w = self.weights[k]
            found[f"loss_cls_stage{k}"] = w * sum(logits) / count
            found[f"loss_box_reg_stage{k}"] = w * 10 * giou / count
            found[f"loss_mask_stage{k}"] = w * torch.stack([self.mask(*m) for m in masks]).mean()
        return found

    def label(self, boxes, target, k):
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)]
        iou = pairwise_iou(target.gt_boxes, Boxes(boxes))
        best, rows = iou.max(dim=0)
        classes = target.gt_classes[rows].clone()
        classes[best < (0.5, 0.6, 0.7, 1.0)[k]] = CLASSES
        return boxes, classes, target.gt_boxes.tensor[rows], rows

    def mask(self, maps, box, c, gt, k):
        x = self.heads.mask_pooler(maps, [Boxes(box[None])])
        logits = self.heads.mask_head[k].layers(x)[0, c]
        truth = gt.crop_and_resize(box[None], logits.shape[-1])[0].float()
        return F.binary_cross_entropy_with_logits(logits, truth)


def slow_losses(ours, gt) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    with EventStorage(1):
        labelled = ours.train().label_and_sample_proposals(b.proposals(), gt)
    samples = []
    matcher = Matcher([0.5], [0, 1], allow_low_quality_matches=False)
    for each, target in zip(labelled, gt):
        rows, _ = matcher(pairwise_iou(target.gt_boxes, each.proposal_boxes))
        samples.append((each.proposal_boxes.tensor, each.gt_classes, each.gt_boxes.tensor, rows))
    return SlowCascade(ours).losses(list(b.features().values()), samples, gt)


def test_losses_with_all_options_equal_a_slow_loop():
    ours = heads(**MANY, **PER_STAGE_MASKS)
    gt = b.targets(masks=True)
    expected, got = slow_losses(ours, gt), losses(ours, gt=gt)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    parameters = list(ours.parameters())
    ours_grad = torch.autograd.grad(sum(got.values()), parameters)
    for x, y in zip(ours_grad, torch.autograd.grad(sum(expected.values()), parameters)):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_detections_with_all_options_equal_a_slow_loop():
    ours = heads(**MANY, **PER_STAGE_MASKS)
    found = detections(ours)
    for n, (each, given) in enumerate(zip(found, b.proposals())):
        maps = [f[n : n + 1] for f in b.features().values()]
        expected = SlowCascade(ours).detect(maps, given.proposal_boxes.tensor, b.SIZE)
        assert len(each) > 10
        got = each.pred_boxes.tensor, each.scores, each.pred_classes
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)
        x = ours.mask_pooler(maps, [each.pred_boxes])
        every = torch.stack([head.layers(x).sigmoid() for head in ours.mask_head]).mean(0)
        mine = every[torch.arange(len(each)), each.pred_classes][:, None]
        torch.testing.assert_close(each.pred_masks, mine, rtol=1e-4, atol=1e-5)


def test_averaged_logits_are_not_averaged_probabilities():
    settings = {**MANY, "score_average": "probabilities"}
    a, other = detections(heads(**MANY))[0], detections(heads(**settings))[0]
    assert not torch.allclose(a.scores[:5], other.scores[:5], atol=1e-3)


# ------------------------------------------------ emptiness, gradients, waiting, scripting


@pytest.mark.parametrize("settings", [MANY, {"agnostic": False}, {}], ids=["many", "plain", "d2"])
@pytest.mark.parametrize("masks", [{}, PER_STAGE_MASKS], ids=["boxes", "masks"])
@pytest.mark.parametrize(
    ("proposal_counts", "target_counts"), [((40, 30), (4, 0)), ((40, 0), (0, 0)), ((0, 0), (0, 2))]
)
def test_empty_images_give_finite_losses_and_a_gradient_for_every_parameter(
    settings, masks, proposal_counts, target_counts
):
    built = heads(**settings, **masks)
    gt = b.targets(target_counts, masks=bool(masks))
    found = losses(built, props=b.proposals(proposal_counts), gt=gt)
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_stage_weights_scale_every_loss_of_their_stage():
    same = {**MANY, **PER_STAGE_MASKS}
    ones = losses(heads(**{**same, "stage_loss_weights": [1.0, 1.0, 1.0]}), masks=True)
    for name, value in losses(heads(**same), masks=True).items():
        torch.testing.assert_close(value, ones[name] * 0.5 ** int(name[-1]))


@pytest.mark.parametrize("settings", [{}, MANY], ids=["d2", "many"])
def test_box_losses_never_wait_per_image(settings):
    def ops(num_images):
        built = heads(**settings).train()
        gt = b.targets((3,) * num_images)
        with EventStorage(1):
            labelled = built.label_and_sample_proposals(b.proposals((30,) * num_images), gt)
            with OpCounter() as counter:
                built._box_losses(b.features(num_images), labelled, gt)
        return counter

    two, eight = ops(2), ops(8)
    assert two.waiting == eight.waiting == 0
    assert (eight.total - two.total) / 6 < 20


@pytest.mark.parametrize("settings", [{}, MANY], ids=["d2", "many"])
def test_bfloat16_autocast_trains_and_detects(settings):
    built = heads(**settings, **PER_STAGE_MASKS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(built, masks=True)
        assert all(v.dtype == torch.float32 and v.isfinite() for v in found.values())
        sum(found.values()).backward()
        assert all(len(each) for each in detections(built))


@pytest.mark.parametrize("settings", [{}, MANY], ids=["d2", "many"])
@pytest.mark.parametrize("per_stage", [False, True])
@torch.no_grad()
def test_scripted_heads_equal_eager(settings, per_stage):
    from detectron2.export.torchscript_patch import freeze_training_mode, patch_instances
    from detectron2.structures import ImageList

    built = heads(**settings, masks=True, per_stage=per_stage).eval()
    eager = detections(built)
    names = ("objectness_logits", "scores", "pred_classes", "pred_masks")
    fields = dict.fromkeys(names, torch.Tensor)
    fields |= {"proposal_boxes": Boxes, "pred_boxes": Boxes}
    with freeze_training_mode(built), patch_instances(fields) as scripted_instances:
        scripted = torch.jit.script(built)
        props = [
            scripted_instances(
                p.image_size, proposal_boxes=p.proposal_boxes, objectness_logits=p.objectness_logits
            )
            for p in b.proposals()
        ]
        images = ImageList(torch.zeros(2, 3, b.SIZE, b.SIZE), [(b.SIZE, b.SIZE)] * 2)
        for _ in range(2):  # the second call runs what the profiling executor has specialised
            found, _ = scripted(images, b.features(), props)
    for x, y in zip(found, eager):
        torch.testing.assert_close(x.pred_boxes.tensor, y.pred_boxes.tensor, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.scores, y.scores)
        assert torch.equal(x.pred_classes, y.pred_classes)
        torch.testing.assert_close(x.pred_masks, y.pred_masks)


# ------------------------------------------------ configs


def test_constructor_defaults_are_the_yacs_defaults():
    import inspect

    node = configs.get_cfg().MODEL.ROI_BOX_CASCADE_HEAD
    init = inspect.unwrap(cascade.FlexibleCascadeROIHeads.__init__)
    defaults = {k: p.default for k, p in inspect.signature(init).parameters.items()}
    assert list(defaults["stage_loss_weights"]) == list(node.STAGE_LOSS_WEIGHTS)
    assert list(defaults["iou_thresholds"]) == list(node.IOUS)
    assert defaults["scale_gradients"] == node.SCALE_GRADIENTS
    assert defaults["score_average"] == node.SCORE_AVERAGE


def test_conv_heads_with_norm_have_no_conv_bias():
    names = dict(heads(num_conv=2, norm="BN").box_head[0].named_parameters())
    assert names.keys() == {
        "conv1.weight", "conv1.norm.weight", "conv1.norm.bias",
        "conv2.weight", "conv2.norm.weight", "conv2.norm.bias",
        "fc1.weight", "fc1.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_average": "mean"}, r"SCORE_AVERAGE\) is 'mean'; expected one of probabilities"),
        ({"stage_loss_weights": [1.0]}, "STAGE_LOSS_WEIGHTS has 1 entries, but .* 3 stages"),
        ({"ious": [0.4, 0.5, 0.6]}, r"IOU_THRESHOLDS\[0\] is 0.5.*make them equal"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        heads(**settings)
