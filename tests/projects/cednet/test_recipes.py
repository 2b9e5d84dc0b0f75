"""Recipes of the detectors on COCO: sizes, rates, schedules, stochastic depth and augmentations of
every config, against the tables of the paper and the official training.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T

from cednet.official_names import correspondence
from d2dense import config, model_zoo
from d2dense.data import augmentations
from d2dense.data.copy_paste import CopyPaste
from d2dense.engine.experiment import experiment
from d2dense.layers import Residual
from tests.projects.cednet import golden
from tests.projects.cednet.test_trunk import block_rates
from tests.projects.parity import optimizer_groups


class Recipe(NamedTuple):
    """What is published of one model.

    Attributes:
        params: number of parameters; measured with the official code, or (in millions) printed in
            the paper; None where neither says anything.
        depth: largest stochastic depth.
        decay: learning rate of a layer relative to the next one.
        layers: how many, besides the stem and what is after the backbone.
        lr: of what is after the backbone.
    """

    params: int | float | None
    depth: float
    decay: float
    layers: int
    lr: float = 1e-4


CEDNET = {
    "retinanet_cednet_next_t": Recipe(38_635_380, 0.2, 0.95, 4),
    "retinanet_cednet_next_s": Recipe(60_984_052, 0.3, 0.95, 9),
    "retinanet_cednet_next_b": Recipe(99_121_652, 0.3, 0.95, 9),
    "retinanet_cednet_swin_t": Recipe(37_135_517, 0.1, 0.95, 4),
    "retinanet_cednet_cswin_t": Recipe(33_566_132, 0.2, 0.95, 7),
    "retinanet_cednet_r50_t": Recipe(39_384_692, 0.0, 1.0, 4),
    # of 27 rates from 0 to 0.2, the official order leaves the last to no block
    "retinanet_cednet_next_t_unet": Recipe(38_884_820, 0.2 * 25 / 26, 0.95, 4),
    "retinanet_cednet_next_t_hourglass": Recipe(38_880_724, 0.2 * 25 / 26, 0.95, 4),
    # its backbone, and what the heads of the others have
    "retinanet_cednet_next_t_fpn_convs": Recipe(33_440_208 + 6_463_220, 0.2, 0.95, 4),
    "retinanet_cednet_next_t_no_lr_blocks": Recipe(38_475_636, 0.2, 0.95, 4),
    "retinanet_cednet_next_t_multiscale": Recipe(38_635_380, 0.2, 0.95, 4),
    "retinanet_cednet_next_t_stages_1_1x": Recipe(26.9, 0.2, 0.95, 2),
    "retinanet_cednet_next_t_stages_2_1x": Recipe(37.64, 0.2, 0.95, 3),
    "retinanet_cednet_next_t_stages_3_1x": Recipe(38.88, 0.2, 0.95, 4),
    "retinanet_cednet_next_t_stages_4_1x": Recipe(39.26, 0.2, 0.95, 5),
    "retinanet_cednet_next_t_split_1of6_1x": Recipe(37.64, 0.2, 0.95, 3),
    "retinanet_cednet_next_t_split_2of6_1x": Recipe(37.64, 0.2, 0.95, 3),
    "retinanet_cednet_next_t_split_4of6_1x": Recipe(37.64, 0.2, 0.95, 3),
    "retinanet_cednet_next_t_split_5of6_1x": Recipe(37.64, 0.2, 0.95, 3),
    "mask_rcnn_cednet_next_t": Recipe(49_741_424, 0.2, 0.95, 4),
    "mask_rcnn_cednet_next_s": Recipe(72_090_096, 0.3, 0.95, 9),
    "mask_rcnn_cednet_next_b": Recipe(110_235_888, 0.4, 0.95, 9),
    "mask_rcnn_cednet_swin_t": Recipe(48_241_561, 0.1, 0.95, 4),
    "mask_rcnn_cednet_cswin_t": Recipe(44_663_984, 0.2, 0.95, 7),
    "faster_rcnn_cednet_next_t": Recipe(None, 0.2, 0.95, 4),
    "cascade_mask_rcnn_cednet_next_t": Recipe(87_576_626, 0.2, 0.6, 4, 2e-4),
    "cascade_mask_rcnn_cednet_next_s": Recipe(109_925_298, 0.3, 0.7, 9, 2e-4),
    "cascade_mask_rcnn_cednet_next_b": Recipe(148_071_090, 0.4, 0.7, 9, 2e-4),
    "cascade_mask_rcnn_cednet_swin_t": Recipe(None, 0.1, 0.6, 4),
}
BASELINES = {
    "retinanet_convnext_t_fpn": Recipe(38_759_572, 0.4, 0.95, 6),
    "retinanet_convnext_s_fpn": Recipe(60_394_132, 0.6, 0.95, 12),
    "retinanet_convnext_t_fpn_multiscale": Recipe(38_759_572, 0.4, 0.95, 6),
    "retinanet_convnext_t_bifpn": Recipe(39, 0.4, 0.95, 6),
    "retinanet_convnext_t_nas_fpn": Recipe(47, 0.4, 0.95, 6),
    "retinanet_hrnet_w32": Recipe(39, 0.0, 1.0, 0),
    "retinanet_r50_fpn": Recipe(37_968_692, 0.0, 1.0, 0),
    "retinanet_swin_t_fpn": Recipe(None, 0.2, 1.0, 0),
    "retinanet_swin_s_fpn": Recipe(60, 0.2, 1.0, 0),
    "retinanet_swin_b_fpn": Recipe(98, 0.3, 1.0, 0),
    "mask_rcnn_convnext_t": Recipe(48_095_376, 0.4, 0.95, 6),
    "mask_rcnn_convnext_s": Recipe(69_729_936, 0.6, 0.95, 12),
    "mask_rcnn_swin_t": Recipe(48, 0.2, 1.0, 0),
    "mask_rcnn_swin_s": Recipe(69, 0.2, 1.0, 0),
    "mask_rcnn_swin_b": Recipe(107, 0.3, 1.0, 0),
    "cascade_mask_rcnn_convnext_t": Recipe(85_930_578, 0.4, 0.7, 6, 2e-4),
    "cascade_mask_rcnn_convnext_s": Recipe(108, 0.6, 0.7, 12, 2e-4),
    "cascade_mask_rcnn_convnext_b": Recipe(146, 0.7, 0.8, 12, 2e-4),
    "cascade_mask_rcnn_swin_t": Recipe(86, 0.2, 1.0, 0),
    "cascade_mask_rcnn_swin_s": Recipe(107, 0.2, 1.0, 0),
    "cascade_mask_rcnn_swin_b": Recipe(145, 0.3, 1.0, 0),
}
RECIPES = CEDNET | BASELINES
every_recipe = pytest.mark.parametrize("name", RECIPES)
PER_EPOCH = 117_266 / 16


@functools.cache
def run_of(name: str):
    return experiment(model_zoo.get_config(f"CEDNet/{name}"), device="cpu")


@functools.cache
def model_of(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return config.build_model(run_of(name).cfg, device="meta")


def test_every_detector_on_coco_is_here():
    methods = ("retinanet_", "faster_rcnn_", "mask_rcnn_", "cascade_mask_rcnn_")
    stems = {name.removeprefix("CEDNet/") for name in model_zoo.list_models("lazy")}
    found = {stem for stem in stems if stem.startswith(methods) and "tiny_shapes" not in stem}
    assert found == set(RECIPES)


# ------------------------------------------------ sizes, rates, schedules


@every_recipe
def test_size(name):
    count = sum(p.numel() for p in model_of(name).parameters())
    expected = RECIPES[name].params
    if isinstance(expected, float):
        assert round(count / 1e6, 1 if expected == 26.9 else 2) == expected
    elif expected is not None and expected < 1000:  # printed in millions
        assert round(count / 1e6) == expected
    elif expected is not None:
        assert count == expected


@every_recipe
def test_learning_rates_and_weight_decays(name):
    recipe = RECIPES[name]
    groups = optimizer_groups(run_of(name), model_of(name))
    assert {group["type"] for group in groups} == {"AdamW"}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.999)}
    # the stem is layer 0, everything after the backbone one layer more than there are
    expected = {recipe.lr * recipe.decay**k for k in range(recipe.layers + 2)}
    assert sorted({group["lr"] for group in groups}) == pytest.approx(sorted(expected))
    decays = {n: group["weight_decay"] for group in groups for n in group["params"]}
    shapes = dict(model_of(name).named_parameters())
    backbone = "backbone.bottom_up." if "cednet" not in name else "backbone."
    inside = {n: decay for n, decay in decays.items() if n.startswith(backbone)}
    outside = [decay for n, decay in decays.items() if n not in inside]
    if "swin" in name and "cednet" not in name:
        tables = {n for n in inside if n.endswith("relative_position_bias_table")}
        norms = {n for n in inside if "norm" in n}
        assert tables
        assert inside == {n: 0.0 if n in tables | norms else 0.05 for n in inside}
        assert 0.05 in outside
        return
    assert set(outside) == {1e-4}
    assert inside == {n: 0.05 if shapes[n].ndim > 1 else 0.0 for n in inside}


@every_recipe
def test_schedule(name):
    run, (epochs, *steps) = run_of(name), (12, 8, 11) if name.endswith("1x") else (36, 27, 33)
    lr, total = run.build_lr_multiplier(), run.settings.max_iter
    assert total == pytest.approx(epochs * PER_EPOCH, abs=0.51)
    assert run.settings.total_batch_size == 16
    assert run.settings.amp_enabled
    assert not run.settings.clip_enabled
    assert not run.settings.ema_enabled
    for iteration, factor in ((0, 0.001), (250, 0.001 + 0.5 * 0.999), (500, 1.0)):
        assert lr(iteration / total) == pytest.approx(factor, rel=1e-3)
    first, second = (round(step * PER_EPOCH) for step in steps)
    around = [first - 2, first + 2, second - 2, second + 2, total - 1]
    factors = [lr(iteration / total) for iteration in around]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@every_recipe
def test_stochastic_depth(name):
    rates = []
    for module in model_of(name).modules():
        if isinstance(module, Residual):
            rates.append(module.drop_path)
        elif type(module).__name__ == "DropPath":
            rates.append(module.drop_prob)
    assert max(rates, default=0.0) == pytest.approx(RECIPES[name].depth)


OFFICIAL_GROUPS = {
    "retinanet_next_tiny": "retinanet_cednet_next_t",
    "retinanet_next_small": "retinanet_cednet_next_s",
    "retinanet_swin_tiny": "retinanet_cednet_swin_t",
    "retinanet_res50": "retinanet_cednet_r50_t",
    "mask_rcnn_next_tiny": "mask_rcnn_cednet_next_t",
    "upernet_next_tiny": "upernet_cednet_next_t",
    "upernet_next_small": "upernet_cednet_next_s",
}
needs_meta = pytest.mark.skipif(not golden.train_meta(), reason="no official training facts here")


@needs_meta
@pytest.mark.parametrize("official", OFFICIAL_GROUPS)
def test_optimizer_groups_are_the_official_ones(official):
    name = OFFICIAL_GROUPS[official]
    expected = golden.train_meta()["param_groups"][official]
    names = correspondence(model_of(name), ()).names
    groups = optimizer_groups(run_of(name), model_of(name))
    found = {
        names.get(parameter, parameter): (group["lr"] / expected["base_lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    in_backbone = {key for key in expected["params"] if key.startswith("backbone.")}
    assert in_backbone == {key for key in found if key.startswith("backbone.")}
    for key in found.keys() & expected["params"].keys():
        assert found[key] == pytest.approx(tuple(expected["params"][key])), key

    def counts(values):
        return Counter((round(scale, 9), decay) for scale, decay in values)

    assert counts(found.values()) == counts(expected["params"].values())


@needs_meta
@pytest.mark.parametrize(
    ("official", "name"),
    [
        ("det_retina_next_tiny", "retinanet_cednet_next_t"),
        ("det_retina_next_tiny_unet", "retinanet_cednet_next_t_unet"),
    ],
)
def test_stochastic_depth_of_every_block_is_the_official_one(official, name):
    expected = golden.train_meta()["drop_path"][official]["blocks"]
    assert block_rates(model_of(name).backbone.trunk) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------ data


@every_recipe
def test_data(name):
    node = run_of(name).cfg.dataloader.train
    mapper, pasting = instantiate(node.mapper), instantiate(node.copy_paste)
    masks = "mask" in name
    assert mapper.image_format == "RGB"
    assert mapper.use_instance_mask == mapper.recompute_boxes == masks
    assert mapper.min_box_side == 0.01
    assert mapper.reject_emptied
    steps = mapper.augmentations.augs
    image = np.zeros((300, 200, 3), np.uint8)
    if "multiscale" in name:
        assert pasting is None
        assert steps[0].prob == 0.5
        sizes = {tuple(augmented(steps, image, seed).shape[:2]) for seed in range(30)}
        assert all(min(size) <= 800 and max(size) <= 1333 for size in sizes)
        assert len(sizes) > 10
    else:
        assert (pasting.prob, pasting.max_iou, pasting.max_objects) == (0.5, 0.2, 7)
        assert isinstance(pasting, CopyPaste)
        assert not pasting.corrected
        jitter = steps[1].jitter
        assert (jitter.image_size, jitter.min_scale, jitter.max_scale) == (1024, 0.1, 2.0)
        assert augmented(steps, image, 0).shape == (1024, 1024, 3)
    test = instantiate(run_of(name).cfg.dataloader.test.mapper).augmentations.augs
    assert augmented(test, image, 0).shape == (1200, 800, 3)
    assert augmented(test, np.zeros((100, 400, 3), np.uint8), 0).shape[1] == 1333


def augmented(steps, image, seed):
    np.random.seed(seed)
    inputs = T.AugInput(image)
    T.AugmentationList(steps)(inputs)
    return inputs.image


def test_multiscale_augmentation_resizes_or_crops_between_two_resizes():
    """The recipe of "existing" by its own words, on the sizes that come out of each branch."""
    flip, crop, resize = augmentations.detr(is_train=True)
    assert (flip.prob, crop.prob) == (0.5, 0.5)
    image = np.zeros((480, 640, 3), np.uint8)
    sides, crops = set(), set()
    for seed in range(60):
        height, width = augmented([resize], image, seed).shape[:2]
        sides.add(height)
        assert width == pytest.approx(height * 640 / 480, abs=1)
        first, cut = crop.aug.augs
        middle = augmented([first], image, seed)
        assert middle.shape[0] in (400, 500, 600)
        part = augmented([cut], middle, seed)
        crops.update(part.shape[:2])
        for side, limit in zip(part.shape[:2], middle.shape[:2]):
            assert min(384, limit) <= side <= min(600, limit)
    assert sides <= set(range(480, 801, 32))
    assert len(sides) > 8
    assert len(crops) > 20


# ------------------------------------------------ saved configs


@pytest.mark.parametrize(
    "name",
    [
        "cascade_mask_rcnn_cednet_next_s",
        "retinanet_cednet_next_t_stages_4_1x",
        "retinanet_cednet_r50_t",
        "retinanet_cednet_cswin_t",
        "retinanet_convnext_t_bifpn",
        "retinanet_hrnet_w32",
        "retinanet_swin_t_fpn",
        "faster_rcnn_cednet_next_t",
    ],
)
def test_saved_configs_load_to_the_same_run(name, tmp_path):
    config.save(run_of(name).cfg, tmp_path / "config.yaml")
    again = experiment(config.load(tmp_path / "config.yaml"), device="cpu")
    assert again.settings == run_of(name).settings
    with torch.device("meta"):
        model = config.build_model(again.cfg, device="meta")
    assert str(model) == str(model_of(name))
    assert optimizer_groups(again, model) == optimizer_groups(run_of(name), model_of(name))
    points = [0.0, 0.1, 0.8, 0.95]
    lr, before = again.build_lr_multiplier(), run_of(name).build_lr_multiplier()
    assert [lr(t) for t in points] == [before(t) for t in points]
