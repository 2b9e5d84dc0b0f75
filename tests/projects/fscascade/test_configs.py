"""Configs: the paper's settings and sizes, and yaml equals lazy."""

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.engine.experiment import experiment
from tests.projects import parity
from tests.projects.parity import KINDS, on_meta

NAMES = [name for name in model_zoo.list_models() if name.startswith("FSCascade/")]
TINY = [name for name in NAMES if "tiny" in name]


def count(modules) -> int:
    modules = modules if isinstance(modules, (list, tuple)) else [modules]
    return sum(p.numel() for module in modules for p in module.parameters())


# ------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("cascade_rcnn_r50_fpn_1x", {}, 69_341_646),
        ("fscascade_cfs_r50_fpn_1x", {}, 69_341_646),
        ("fscascade_r50_fpn_1x", {}, 71_971_790),
        ("fscascade_r50_fpn_1x", {"avgpool": True}, 71_824_334),
        ("cascade_rcnn_r101_fpn_2x", {}, 88_281_550),
        ("fscascade_r101_fpn_2x", {}, 90_911_694),
        ("faster_rcnn_r50_fpn_1x", {}, 41_699_936),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts(name, override, expected, kind):
    overrides = []
    if override:
        overrides = {
            "yaml": ["MODEL.FSCASCADE.BOX_PREDICTOR=avgpool"],
            "lazy": [f"model.roi_heads.box_predictors.{k}.box_predictor=avgpool" for k in range(3)],
        }[kind]
    assert count(on_meta(f"FSCascade/{name}", kind, *overrides)) == expected


def test_parameter_counts_by_part():
    heads = on_meta("FSCascade/fscascade_r50_fpn_1x", "lazy").roi_heads
    convs = [m for m in heads.loc_head.modules() if isinstance(m, torch.nn.Conv2d)]
    by_kernel = {k: [c for c in convs if c.kernel_size == (k, k)] for k in (1, 3)}
    assert [count(head) for head in heads.box_head] == [13_895_680] * 3
    assert [count(p.cls_score) for p in heads.box_predictor] == [83_025] * 3
    assert [count(p.bbox_pred) for p in heads.box_predictor] == [50_180] * 3
    assert [count(c) for c in by_kernel[3]] == [590_080] * 4
    assert [count(c) for c in by_kernel[1]] == [65_792] * 2
    plain = on_meta("FSCascade/cascade_rcnn_r50_fpn_1x", "lazy").roi_heads
    assert [count(p.bbox_pred) for p in plain.box_predictor] == [4_100] * 3
    assert count(plain) == 41_948_415


def test_cascade_checkpoints_fit_but_for_the_box_layers():
    ours = on_meta("FSCascade/fscascade_r50_fpn_1x", "lazy").state_dict()
    plain = on_meta("FSCascade/cascade_rcnn_r50_fpn_1x", "lazy").state_dict()
    different = {
        name for name in plain if name not in ours or plain[name].shape != ours[name].shape
    }
    assert different == {f"roi_heads.box_predictor.{k}.bbox_pred.weight" for k in range(3)}
    new = {name.split(".")[1] for name in ours.keys() - plain.keys()}
    assert new == {"loc_head"}


# ------------------------------------------------ yaml = lazy


def test_every_model_has_both_kinds():
    assert len(TINY) >= 4
    assert all(name in model_zoo.list_models(kind) for name in NAMES for kind in KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_give_the_same_model_and_run(name):
    parity.check_model_and_run(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    # settings of a mapper that only training reads
    ignored = () if train else ("use_instance_mask", "min_box_side", "reject_emptied")
    parity.check_data(name, train=train, ignored=ignored)


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    parity.check_start(name)


# ------------------------------------------------ the paper's settings


def test_paper_schedule_is_computed_from_images_epochs_and_batch():
    for name, epochs, max_iter, steps in (
        ("fscascade_r50_fpn_1x", 20, 146_583, (73_291, 117_266)),
        ("fscascade_r50_fpn_2x", 40, 293_165, (146_583, 234_532)),
    ):
        run = experiment(model_zoo.get_config(f"FSCascade/{name}"), device="cpu")
        assert run.settings.max_iter == max_iter
        lr = run.build_lr_multiplier()
        changes = [0, 7_329, *steps]
        factors = [lr(i / max_iter) for i in changes]
        before = [lr((i - 1) / max_iter) for i in changes[1:]]
        assert factors == pytest.approx([0.1, 1.0, 0.1, 0.01])
        assert before == pytest.approx([0.1, 1.0, 0.1])
        assert max_iter == pytest.approx(epochs * 117_266 / 16, abs=0.51)


def test_paper_settings():
    cfg = model_zoo.get_config("FSCascade/fscascade_r50_fpn_1x", "yaml")
    cascade, solver = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.SOLVER
    assert tuple(cascade.IOUS) == (0.5, 0.6, 0.7)
    weights = [tuple(w) for w in cascade.BBOX_REG_WEIGHTS]
    assert weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    assert cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
    assert cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignV2"
    assert pytest.approx(1 / 9) == cfg.MODEL.RPN.SMOOTH_L1_BETA
    rpn = cfg.MODEL.RPN
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TRAIN) == (2000, 2000)
    assert (rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST) == (1000, 1000)
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION, rpn.NMS_THRESH) == (256, 0.5, 0.7)
    assert tuple(rpn.IOU_THRESHOLDS) == (0.3, 0.7)
    heads = cfg.MODEL.ROI_HEADS
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25)
    assert (heads.NMS_THRESH_TEST, heads.SCORE_THRESH_TEST) == (0.5, 0.05)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    assert list(cfg.MODEL.FSCASCADE.STAGE_LOSS_WEIGHTS) == [1.0, 0.5, 0.25]
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1200)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1200)
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.02, 0.9, 0.0001)
    assert solver.IMS_PER_BATCH == 16
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"


def test_constructor_defaults_equal_yacs_defaults():
    import inspect

    from fscascade import FSCascadeROIHeads, LocalizationHead, StagePredictor

    node = config.get_cfg().MODEL.FSCASCADE
    cascade = config.get_cfg().MODEL.ROI_BOX_CASCADE_HEAD

    def defaults(constructor):
        return {k: p.default for k, p in inspect.signature(constructor).parameters.items()}

    heads = defaults(FSCascadeROIHeads.__init__)
    assert heads["cfs"] == node.CFS
    assert list(heads["stage_loss_weights"]) == list(node.STAGE_LOSS_WEIGHTS)
    assert heads["scale_gradients"] == node.SCALE_GRADIENTS
    assert heads["test_scores"] == node.TEST_SCORES
    assert tuple(heads["iou_thresholds"]) == tuple(cascade.IOUS)
    loc_head = defaults(LocalizationHead.__init__)
    assert loc_head["sharing"] == node.LFS
    assert loc_head["mode"] == node.LFS_MODE
    assert loc_head["relu_after_1x1"] == node.LFS_RELU_AFTER_1X1
    assert defaults(StagePredictor.__init__)["box_predictor"] == node.BOX_PREDICTOR
