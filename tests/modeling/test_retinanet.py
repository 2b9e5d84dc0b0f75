"""BatchRetinaNet against loops over anchors, and against Detectron2's RetinaNet."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2dense import config
from d2dense.config import build_model
from d2dense.errors import UserError
from tests.modeling.waiting import OpCounter

SIZE, CLASSES = 64, 3


def yaml_config(name: str = "BatchRetinaNet", **keys):
    cfg = config.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[s, s * 1.5] for s in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES = CLASSES
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0
    for key, value in keys.items():
        cfg.MODEL.RETINANET[key.upper()] = value
    return cfg


def build(name: str = "BatchRetinaNet", seed: int = 0, **keys):
    torch.manual_seed(seed)
    model = build_model(yaml_config(name, **keys)).train()
    for part in (model.head.cls_score, model.head.bbox_pred):
        torch.nn.init.normal_(part.weight, std=0.1)
    return model


def batch(counts=(3, 2), seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * SIZE / 2
        side = 6 + torch.rand(count, 2, generator=generator) * SIZE / 2
        target = Instances((SIZE, SIZE))
        target.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        target.gt_classes = torch.arange(count) % CLASSES
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator)
        result.append({"image": pixels.to(torch.uint8), "instances": target})
    return result


def losses(model, data, iteration: int = 1) -> dict[str, torch.Tensor]:
    with EventStorage(iteration):
        return model(data)


# ------------------------------------------------ a slow, obvious RetinaNet loss


def overlap(a: list[float], b: list[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0.0) * max(h, 0.0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])  # noqa: E731
    return both / (area(a) + area(b) - both)


def assign(anchors: list[list[float]], boxes: list[list[float]]) -> list[int | None]:
    """Index of each anchor's box, -1 for background, None where ignored."""
    iou = [[overlap(anchor, box) for box in boxes] for anchor in anchors]
    found = []
    for row in iou:
        best = max(row, default=0.0)
        found.append(row.index(best) if best >= 0.5 else None if best >= 0.4 else -1)
    for g in range(len(boxes)):
        top = max(row[g] for row in iou)
        for r, row in enumerate(iou):
            if row[g] == top and top > 0:
                found[r] = row.index(max(row))
    return found


def focal(logit: float, target: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)


def move(anchor: list[float], box: list[float]) -> list[float]:
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return [
        ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / w,
        ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / h,
        math.log((box[2] - box[0]) / w),
        math.log((box[3] - box[1]) / h),
    ]


def slow_losses(model, data) -> dict[str, float]:
    """Loops in double precision over what the model predicts."""
    model = model.double()
    images = model.preprocess_image(data)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    logits, deltas = (
        torch.cat(each, 1).tolist()
        for each in model._transpose_dense_predictions(model.head(features), [CLASSES, 4])
    )
    anchors = [
        [float(x) for x in a]
        for level in model.anchor_generator(features)
        for a in level.tensor.tolist()
    ]
    cls_sum = box_sum = positives = 0
    for n, each in enumerate(data):
        boxes = each["instances"].gt_boxes.tensor.tolist()
        classes = each["instances"].gt_classes.tolist()
        for r, box in enumerate(assign(anchors, boxes)):
            if box is None:
                continue
            for k in range(CLASSES):
                cls_sum += focal(logits[n][r][k], box >= 0 and classes[box] == k)
            if box >= 0:
                positives += 1
                target = move(anchors[r], boxes[box])
                box_sum += sum(abs(x - y) for x, y in zip(deltas[n][r], target))
    number = max(positives, 1)
    return {"loss_cls": cls_sum / number, "loss_box_reg": box_sum / number}


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_losses_equal_loops_over_anchors(counts):
    model, data = build(), batch(counts)
    got = losses(model, data)
    expected = slow_losses(model, data)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4), name


# ------------------------------------------------ Detectron2


@pytest.mark.parametrize("loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_running_average_is_detectron2s(loss):
    theirs = build("RetinaNet", bbox_reg_loss_type=loss, smooth_l1_loss_beta=0.1)
    ours = build(
        bbox_reg_loss_type=loss, smooth_l1_loss_beta=0.1, loss_normalizer="running_average"
    )
    for step in range(3):
        data = batch((3 + step, 2), seed=step)
        expected, got = losses(theirs, data), losses(ours, data)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    assert float(ours.loss_normalizer) == theirs.loss_normalizer
    sum(expected.values()).backward()
    sum(got.values()).backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_names_initialisation_and_detections_are_detectron2s():
    theirs = build("RetinaNet", score_thresh_test=0.0)
    ours = build(score_thresh_test=0.0)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(theirs.parameters(), ours.parameters()))
    for model in (theirs, ours):
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0  # statistics of one batch, or activations would explode
        losses(model, batch())
        model.eval()
    for x, y in zip(theirs(batch()), ours(batch())):
        assert len(x["instances"]) > 0
        assert torch.equal(x["instances"].pred_boxes.tensor, y["instances"].pred_boxes.tensor)


def test_untrained_scores_are_the_prior():
    logits, _ = build_model(yaml_config()).head([torch.zeros(1, 8, 4, 4)] * 5)
    torch.testing.assert_close(logits[0].sigmoid(), torch.full_like(logits[0], 0.01))


def test_positives_do_not_remember_earlier_batches():
    model = build()
    first = losses(model, batch())
    losses(model, batch((9, 9), seed=3))
    again = losses(model, batch())
    assert torch.equal(first["loss_box_reg"], again["loss_box_reg"])
    assert not hasattr(model, "loss_normalizer")


# ------------------------------------------------ emptiness, precision, waiting


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_empty_images_give_finite_losses_and_a_gradient_for_every_parameter(counts, loss):
    model = build(bbox_reg_loss_type=loss)
    found = losses(model, batch(counts))
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("normalizer", ["positives", "running_average"])
@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_a_training_forward_never_waits(normalizer, loss):
    model = build(loss_normalizer=normalizer, bbox_reg_loss_type=loss)
    data = batch()
    images = model.preprocess_image(data)  # puts sizes that the host knows into tensors
    targets = [each["instances"] for each in data]
    with EventStorage(1), OpCounter() as counter:  # not a step that logs
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        model.forward_training(images, features, model.head(features), targets)
    assert counter.total > 100
    assert counter.waiting == 0


def test_the_number_of_positives_is_logged_now_and_then():
    model = build()
    with EventStorage(0) as storage:
        model(batch())
        assert storage.latest()["num_pos_anchors"][0] >= 2.5
    with EventStorage(1) as storage:
        model(batch())
        assert "num_pos_anchors" not in storage.latest()


def test_losses_are_float32_under_autocast():
    model, data = build(), batch()
    expected = losses(model, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses(model, data)
    for name, value in got.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05)


# ------------------------------------------------ configs


def test_lazy_and_yaml_build_the_same():
    from detectron2.config import LazyCall as L
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.backbone import FPN
    from detectron2.modeling.backbone.fpn import LastLevelP6P7
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    from d2dense.modeling import AnchorMatcher, BatchRetinaNet, box_transform

    stages = L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="BN")
    lazy = L(BatchRetinaNet)(
        backbone=L(FPN)(
            bottom_up=L(ResNet)(
                stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
                stages=stages,
                out_features=["res3", "res4", "res5"],
                freeze_at=2,
            ),
            in_features=["res3", "res4", "res5"],
            out_channels=8,
            top_block=L(LastLevelP6P7)(in_channels=2048, out_channels=8),
        ),
        head=L(RetinaNetHead)(
            input_shape=[L(ShapeSpec)(channels=8)] * 5,
            num_classes=CLASSES,
            num_anchors=6,
            conv_dims=[8],
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[s, s * 1.5] for s in (16, 32, 64, 128, 256)],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        box2box_transform=L(box_transform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(AnchorMatcher)(),
        num_classes=CLASSES,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )
    cfg = yaml_config()
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64, 256
    torch.manual_seed(0)
    ours = instantiate(lazy)
    torch.manual_seed(0)
    yaml = build_model(cfg)
    assert yaml.state_dict().keys() == ours.state_dict().keys()
    plain = (str, int, float, bool, tuple)
    for key, value in vars(yaml).items():
        if isinstance(value, plain):
            assert vars(ours)[key] == value, key
    assert vars(yaml.anchor_matcher) == vars(ours.anchor_matcher)
    for name, parameter in yaml.named_parameters():
        other = ours.get_parameter(name)
        assert parameter.shape == other.shape, name
        assert parameter.requires_grad == other.requires_grad, name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_normalizer", "mean", r"LOSS_NORMALIZER\) is 'mean'; expected one of positives"),
        ("bbox_reg_loss_type", "iou", r"BBOX_REG_LOSS_TYPE\) is 'iou'; expected one of smooth_l1"),
    ],
)
def test_mistakes_are_named(key, value, message):
    with pytest.raises(UserError, match=message):
        build(**{key: value})
