"""Heads of the detectors on COCO: numbers of the official ones, also where Detectron2 differs."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import instantiate

from tests.projects.cednet.test_recipes import RECIPES, every_recipe, model_of, run_of


@every_recipe
def test_images_are_normalised_and_padded_as_in_the_official_code(name):
    model = model_of(name)
    assert model.input_format == "RGB"
    assert model.backbone.size_divisibility == 128
    node = run_of(name).cfg.model
    assert list(node.pixel_mean) == [123.675, 116.28, 103.53]
    assert list(node.pixel_std) == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("retinanet")])
def test_retinanet(name):
    model = model_of(name)
    convs = [m for m in model.head.cls_subnet if isinstance(m, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [256] * 4
    assert len(model.head.cls_subnet) == len(model.head.bbox_subnet) == 8  # and ReLUs, no norms
    sizes = [4 * stride * 2 ** (k / 3) for stride in (8, 16, 32, 64, 128) for k in range(3)]
    node = run_of(name).cfg.model.anchor_generator
    assert [size for level in node.sizes for size in level] == pytest.approx(sizes)
    assert list(node.aspect_ratios) == [0.5, 1.0, 2.0]
    assert list(model.head_in_features) == ["p3", "p4", "p5", "p6", "p7"]
    assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.25, 2.0)
    assert (model.box_reg_loss_type, model.smooth_l1_beta) == ("smooth_l1", 0.0)  # L1
    assert tuple(model.box2box_transform.weights) == (1.0, 1.0, 1.0, 1.0)
    assert not model.running_average
    matcher = model.anchor_matcher
    assert (matcher.thresholds, matcher.labels) == ((0.4, 0.5), (0, -1, 1))
    assert matcher.low_quality_matches == "own"
    limits = (model.test_score_thresh, model.test_nms_thresh, model.max_detections_per_image)
    assert limits == (0.05, 0.5, 100)
    assert model.test_topk_candidates == 1000


def test_retinanet_starts_with_probabilities_of_one_percent():
    head = run_of("retinanet_cednet_next_t").cfg.model.head
    torch.manual_seed(0)
    built = instantiate(head)
    assert built.cls_score.bias.tolist() == pytest.approx([-math.log(99)] * 720)
    weights = torch.cat([p.flatten() for n, p in built.named_parameters() if "weight" in n])
    assert float(weights.detach().std()) == pytest.approx(0.01, rel=0.01)


TWO_STAGE = [name for name in RECIPES if "rcnn" in name]


@pytest.mark.parametrize("name", TWO_STAGE)
def test_proposals(name):
    cascade = name.startswith("cascade")
    rpn = model_of(name).proposal_generator
    node = run_of(name).cfg.model.proposal_generator.anchor_generator
    assert [size for level in node.sizes for size in level] == [32, 64, 128, 256, 512]
    assert list(node.strides) == [4, 8, 16, 32, 64]
    assert list(node.aspect_ratios) == [0.5, 1.0, 2.0]
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert rpn.post_nms_topk == {True: 2000 if cascade else 1000, False: 1000}
    assert rpn.nms_thresh == 0.7
    assert (rpn.batch_size_per_image, rpn.positive_fraction) == (256, 0.5)
    assert rpn.box_reg_loss_type == "smooth_l1"
    assert rpn.smooth_l1_beta == pytest.approx(1 / 9 if cascade else 0.0)
    assert rpn.anchor_matcher.thresholds[1:-1] == [0.3, 0.7]
    assert rpn.anchor_matcher.allow_low_quality_matches


@pytest.mark.parametrize("name", TWO_STAGE)
def test_regions(name):
    heads = model_of(name).roi_heads
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert heads.proposal_append_gt
    poolers = {7: heads.box_pooler}
    if "mask" in name:
        poolers[14] = heads.mask_pooler
    assert hasattr(heads, "mask_pooler") == ("mask" in name)
    for side, pooler in poolers.items():
        assert pooler.output_size == (side, side)
        assert [level.spatial_scale for level in pooler.level_poolers] == [
            1 / 4,
            1 / 8,
            1 / 16,
            1 / 32,
        ]
        assert all(level.sampling_ratio == 0 and level.aligned for level in pooler.level_poolers)
    predictors = heads.box_predictor
    predictors = predictors if name.startswith("cascade") else [predictors]
    for predictor in predictors:
        assert predictor.bbox_pred.out_features == 80 * 4  # class-specific
        limits = (predictor.test_score_thresh, predictor.test_nms_thresh)
        assert (*limits, predictor.test_topk_per_image) == (0.05, 0.5, 100)


@pytest.mark.parametrize("name", [name for name in TWO_STAGE if not name.startswith("cascade")])
def test_box_head_of_mask_rcnn(name):
    heads = model_of(name).roi_heads
    layers = [type(m).__name__ for m in heads.box_head if list(m.parameters())]
    assert layers == ["Linear", "Linear"]
    predictor = heads.box_predictor
    assert (predictor.box_reg_loss_type, predictor.smooth_l1_beta) == ("smooth_l1", 0.0)
    assert tuple(predictor.box2box_transform.weights) == pytest.approx((10, 10, 5, 5))
    assert list(heads.proposal_matcher.thresholds)[1:-1] == [0.5]
    assert not heads.proposal_matcher.allow_low_quality_matches


@pytest.mark.parametrize("name", [name for name in TWO_STAGE if name.startswith("cascade")])
def test_cascade(name):
    heads = model_of(name).roi_heads
    assert heads.iou_thresholds == (0.5, 0.6, 0.7)
    assert heads.stage_loss_weights == (1.0, 0.5, 0.25)
    assert not heads.scale_gradients
    assert heads.score_average == "logits"
    assert len(heads.mask_head) == len(heads.box_head) == 3
    stds = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    for head, predictor, std in zip(heads.box_head, heads.box_predictor, stds):
        convs = [m for m in head if isinstance(m, torch.nn.Conv2d)]
        assert [(conv.out_channels, conv.kernel_size) for conv in convs] == [(256, (3, 3))] * 4
        assert all(type(conv.norm) is torch.nn.SyncBatchNorm for conv in convs)
        assert [m.out_features for m in head if isinstance(m, torch.nn.Linear)] == [1024]
        assert predictor.box_reg_loss_type == "giou"
        assert predictor.loss_weight["loss_box_reg"] == 10.0
        assert tuple(predictor.box2box_transform.weights) == pytest.approx([1 / s for s in std])


def test_resnets_train_with_synchronised_norms():
    for name in ("retinanet_cednet_r50_t", "retinanet_r50_fpn", "retinanet_hrnet_w32"):
        norms = [m for m in model_of(name).modules() if "BatchNorm" in type(m).__name__]
        assert norms
        assert {type(m) for m in norms} == {torch.nn.SyncBatchNorm}
        assert all(p.requires_grad for p in model_of(name).parameters())
