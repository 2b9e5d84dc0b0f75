"""Configs: the paper's settings and sizes, and yaml equals lazy."""

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig

from d2dense import config, model_zoo
from d2dense.data import mappers
from d2dense.engine.experiment import experiment

NAMES = [name for name in model_zoo.list_models() if name.startswith("FSCascade/")]
TINY = [name for name in NAMES if "tiny" in name]
KINDS = ("yaml", "lazy")


def on_meta(name: str, kind: str, *overrides: str) -> torch.nn.Module:
    cfg = config.load(model_zoo.get_config_file(name, kind), overrides)
    with torch.device("meta"):
        return config.build_model(cfg, device="meta")


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
    by_yaml, by_lazy = (
        experiment(model_zoo.get_config(name, kind), device="cpu") for kind in KINDS
    )
    assert by_yaml.settings == by_lazy.settings
    assert by_yaml.train_names == by_lazy.train_names
    assert by_yaml.test_names == by_lazy.test_names
    with torch.device("meta"):
        models = [config.build_model(e.cfg, device="meta") for e in (by_yaml, by_lazy)]
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert settings_of(models[0]) == settings_of(models[1])
    groups = [optimizer_groups(e, model) for e, model in zip((by_yaml, by_lazy), models)]
    assert groups[0] == groups[1]
    schedules = [e.build_lr_multiplier() for e in (by_yaml, by_lazy)]
    where = torch.linspace(0, 0.999, 97).tolist()
    assert [schedules[0](t) for t in where] == pytest.approx([schedules[1](t) for t in where])


def settings_of(model) -> dict[str, dict]:
    """Plain attributes of all modules and of what they hold: thresholds, weights, sizes, modes."""
    plain = (bool, int, float, str, tuple, list, dict, type(None), ListConfig, DictConfig)
    found = {}
    for name, module in model.named_modules():
        values = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, plain) and not key.startswith("_") and key != "vis_period"
        }
        for key in ("box2box_transform", "anchor_matcher", "proposal_matcher", "anchor_generator"):
            if hasattr(module, key) and not isinstance(getattr(module, key), torch.nn.Module):
                held = getattr(module, key)
                for attribute in ("weights", "thresholds", "labels", "allow_low_quality_matches"):
                    if hasattr(held, attribute):
                        values[f"{key}.{attribute}"] = getattr(held, attribute)
        if isinstance(values.get("loss_weight"), (dict, DictConfig)):
            values["loss_weight"] = {k: v for k, v in values["loss_weight"].items() if v != 1.0}
        found[name] = {key: listed(value) for key, value in values.items()}
    return found


def listed(value):
    if isinstance(value, (dict, DictConfig)):
        return {k: listed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, ListConfig)):
        return [listed(v) for v in value if not isinstance(v, torch.nn.Module)]
    return value


def optimizer_groups(run, model) -> list[dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = run.build_optimizer(model)
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "type": type(optimizer).__name__,
         "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    yaml, lazy = (model_zoo.get_config(name, kind) for kind in KINDS)
    node = lazy.dataloader.train if train else lazy.dataloader.test
    by_yaml, by_lazy = mappers.from_cfg(yaml, train), instantiate(node.mapper)
    ours, theirs = (
        {k: str(v) for k, v in vars(mapper).items() if train or k != "use_instance_mask"}
        for mapper in (by_yaml, by_lazy)
    )
    assert ours == theirs
    if train:
        assert node.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
        assert node.dataset.filter_empty == yaml.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        assert node.aspect_ratio_grouping == yaml.DATALOADER.ASPECT_RATIO_GROUPING
    else:  # masks are not read in evaluation, whatever the mapper's setting
        assert node.batch_size == yaml.DATALOADER.TEST_BATCH_SIZE
    assert node.num_workers == yaml.DATALOADER.NUM_WORKERS


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    states = []
    for kind in KINDS:
        torch.manual_seed(0)
        states.append(
            config.build_model(model_zoo.get_config(name, kind), device="cpu").state_dict()
        )
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


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
