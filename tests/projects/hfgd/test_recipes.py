"""The paper's recipes (section 8 of the reference): every config as it is written there."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from d2dense import config, model_zoo
from d2dense.data import mappers
from d2dense.engine.experiment import experiment
from d2dense.solver.optim import is_norm
from tests.data.test_semantic_augmentations import everything

PASCAL, CITY = "pascal_context_sem_seg", "cityscapes_fine_sem_seg"
COCO, ADE = "coco_stuff_164k_sem_seg", "ade20k_sem_seg"
SGD, ADAMW = "SGD", "AdamW"
CAR = "car"
ENCODERS = {
    "identity": "IdentityEncoder",
    "aspp": "ASPP",
    "ocr": "OCR",
    "self_attention": "SelfAttentionEncoder",
    "car": "CAREncoder",
}

# name: (data, classes, optimiser, iterations, crop), (encoder, upsampler, stride, HFGM)
RECIPES = {}


def add(name, data, run, network):
    RECIPES[name] = (data, *run, *network)


_data = {
    "pascal_context": (PASCAL, 59),
    "cityscapes": (CITY, 19),
    "coco_stuff": (COCO, 171),
    "ade20k": (ADE, 150),
}
_r50 = (SGD, 30_000, (513, 513))
_swin = (SGD, 40_000, (513, 513))
_next = (ADAMW, 40_000, (512, 512))
_city = (SGD, 30_000, (513, 1025))
# Table 1, columns "none" and "SFPN"
for _name, _encoder in {
    "identity": "identity",
    "aspp": "aspp",
    "ocr": "ocr",
    "self_attention": "self_attention",
    "cae": CAR,
}.items():
    add(f"{_name}_r50", "pascal_context", _r50, (_encoder, "none", None, False))
    _fpn = "semantic_fpn_r50" if _name == "identity" else f"semantic_fpn_r50_{_name}"
    add(_fpn, "pascal_context", _r50, (_encoder, "sfpn", 4, False))
# Tables 2 to 5
add("hfgd_r50_sfpn_no_axial_attention", "pascal_context", _r50, (CAR, "sfpn", 4, True))
add("hfgd_r50_sfpn", "pascal_context", _r50, (CAR, "sfpn", 4, True))
add("usfpn_r50", "pascal_context", _r50, ("identity", "usfpn", 4, False))
add("usfpn_r50_cae", "pascal_context", _r50, (CAR, "usfpn", 4, False))
for _stride in (4, 2, 1):
    add(f"hfgd_r50_os{_stride}", "pascal_context", _r50, (CAR, "usfpn", _stride, True))
add("hfgd_r50_os4_lead_3x3", "pascal_context", _r50, (CAR, "usfpn", 4, True))
add("sa_car_r50_d8", "pascal_context", _r50, (CAR, "none", None, False))
add("semantic_fpn_swin_l_cae", "pascal_context", _swin, (CAR, "sfpn", 4, False))
add("usfpn_swin_l", "pascal_context", _swin, ("identity", "usfpn", 4, False))
add("usfpn_swin_l_cae", "pascal_context", _swin, (CAR, "usfpn", 4, False))
add("hfgd_swin_l_sfpn", "pascal_context", _swin, (CAR, "sfpn", 4, True))
add("hfgd_swin_l_os4", "pascal_context", _swin, (CAR, "usfpn", 4, True))
# Tables 6, 7, 9 and 10
for _name in ("convnext_l", "convnextv2_l"):
    add(f"hfgd_{_name}_os4", "pascal_context", _next, (CAR, "usfpn", 4, True))
    add(f"semantic_fpn_{_name}", "pascal_context", _next, ("identity", "sfpn", 4, False))
RECIPES = {f"{name}_pascal_context": recipe for name, recipe in RECIPES.items()}
add("hfgd_convnext_l_os4_coco_stuff", "coco_stuff", _next, (CAR, "usfpn", 4, True))
for _stride, _iterations in ((4, 60_000), (2, 80_000)):
    _run = (ADAMW, _iterations, (512, 1024))
    _network = (CAR, "usfpn", _stride, True)
    add(f"hfgd_convnext_l_os{_stride}_cityscapes", "cityscapes", _run, _network)
    add(f"hfgd_r50_os{_stride}_cityscapes", "cityscapes", _city, (CAR, "usfpn", _stride, True))
# Table 8
add("semantic_fpn_r50_cityscapes", "cityscapes", _city, ("identity", "sfpn", 4, False))
add("hfgd_r50_os4_ade20k", "ade20k", (SGD, 80_000, (513, 513)), (CAR, "usfpn", 4, True))

NAMES = sorted(RECIPES)


@functools.lru_cache(maxsize=1)  # tests of one name follow each other
def built(name):
    """Return the config, the experiment and the model on the meta device."""
    cfg = model_zoo.get_config(f"HFGD/{name}")
    with torch.device("meta"):
        model = config.build_model(cfg, device="meta")
    return cfg, experiment(cfg, device="cpu"), model


def test_every_config_is_a_recipe_of_this_list():
    configs = {n.removeprefix("HFGD/") for n in model_zoo.list_models() if n.startswith("HFGD/")}
    # those on the backbone of another paper are in tests/composition
    own = {name for name in configs if "cednet" not in name}
    assert {name for name in own if "tiny" not in name} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name):
    data, optimizer, iterations, crop, encoder, upsampler, stride, hfgm = RECIPES[name]
    cfg, run, model = built(name)
    check_network(model, encoder, upsampler, stride, hfgm)
    check_data(cfg, run, _data[data], optimizer, crop)
    assert run.settings.max_iter == iterations
    assert run.settings.amp_enabled
    assert not run.settings.clip_enabled
    assert not run.settings.ema_enabled
    check_rates(run, 0.01 if optimizer == SGD else 4e-5)
    check_groups(name, run, model, optimizer)
    check_norms(model)
    check_evaluation(name, model, data)
    if "_r50_" not in name:
        check_stochastic_depth(model)


def check_network(model, encoder, upsampler, stride, hfgm):
    head = model.sem_seg_head
    assert type(head.encoder).__name__ == ENCODERS[encoder]
    assert (head.upsampler is None) == (upsampler == "none")
    if upsampler != "none":
        lateral = next(m for m in head.upsampler.laterals.modules() if isinstance(m, nn.Conv2d))
        assert lateral.kernel_size[0] == (3 if upsampler == "usfpn" else 1)
        branches = [m for m in head.upsampler.branches.modules() if isinstance(m, nn.Conv2d)]
        assert len(branches) == {4: 1 + 1 + 2 + 3, 2: 2 + 2 + 3 + 4, 1: 3 + 3 + 4 + 5}[stride]
    assert (head.hfgm is not None) == hfgm


def check_data(cfg, run, expected, optimizer, crop):
    data, classes = expected
    assert run.train_names == [f"{data}_train"]
    assert run.test_names == [f"{data}_val"]
    assert cfg.model.sem_seg_head.num_classes == classes
    assert cfg.dataloader.train.total_batch_size == 16
    scale, distort, flip = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert (scale.min_size, *scale.scale_range, scale.scale_step) == (0, 0.5, 2.0, 0.25)
    names = [type(step).__name__ for step in distort.distortions]
    colors = ["ContrastJitter", "SaturationJitter"] if optimizer == ADAMW else []
    assert names == [*colors, "BrightnessShift"]
    assert distort.distortions[-1].largest == 32
    assert tuple(distort.crop.sides) == tuple(cfg.model.pad_to) == crop
    assert (list(distort.crop.pad_value), distort.crop.ignore_label) == ([127.5], 255)
    assert flip.prob == 0.5


def check_rates(run, rate):
    """Poly 0.9 per iteration from the first rate to zero, without a warm-up."""
    schedule = run.build_lr_multiplier()
    last = run.settings.max_iter
    for t in (0, 1, last // 3, last - 1):
        assert schedule(t / last) == pytest.approx((1 - t / last) ** 0.9, rel=1e-9)
    assert run.cfg.optimizer.lr == rate


def check_groups(name, run, model, kind):
    optimizer = run.build_optimizer(model)
    assert type(optimizer).__name__ == kind
    decay, rate = (1e-4, 0.01) if kind == SGD else (0.05, 4e-5)
    spared = set()
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if is_norm(module) or own in ("bias", "relative_position_bias_table"):
                spared.add(parameter)
    for group in optimizer.param_groups:
        assert group["lr"] == rate
        if kind == SGD:
            assert group["momentum"] == 0.9
            assert not group["nesterov"]
        else:
            assert tuple(group["betas"]) == (0.9, 0.999)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if parameter in spared else decay)
    tables = [key for key, _ in model.named_parameters() if "relative_position" in key]
    assert all(model.get_parameter(key) in spared for key in tables)
    assert bool(tables) == ("swin" in name)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*model.parameters()])


def check_norms(model):
    batch_norms = 0
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            batch_norms += 1
            assert module.momentum == 3e-4
            assert module.eps == (1.001e-5 if prefix.startswith("backbone") else 1e-3)
            assert "Sync" in type(module).__name__, prefix
            assert module.weight.requires_grad
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, prefix
    assert batch_norms > 0


def check_evaluation(name, model, data):
    inference = model.inference
    assert inference.window is None
    assert not inference.multi_scale
    assert inference.ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert inference.flip
    assert (inference.average, inference.keep_odd) == ("logits", True)
    assert (inference.align_corners, inference.pad_value) == (True, 127.5)
    even = "convnext" in name
    expected = {
        "pascal_context": [512, 512] if even else [513, 513],
        "cityscapes": [1, 1] if even else [1025, 2049],
    }
    assert inference.pad_to == expected.get(data, [1, 1])
    assert model.backbone.size_divisibility == (32 if even else 0)


def check_stochastic_depth(model):
    """It rises linearly over the blocks, to 0.3."""
    rates = [m.drop_prob for m in model.backbone.modules() if type(m).__name__ == "DropPath"]
    expected = np.linspace(0, 0.3, len(rates) + 1)  # the first block has none
    if rates[0] == rates[1]:  # Swin: attention and perceptron of a block
        expected = np.linspace(0, 0.3, len(rates) // 2 + 1).repeat(2)[1:]
    np.testing.assert_allclose([0.0, *rates], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("swin_l_os4", 195.2e6), ("convnext_l_os4", 196.2e6), ("convnextv2_l_os4", 196.4e6)],
)
def test_large_backbones_are_those_of_the_paper(name, parameters):
    _, _, model = built(f"hfgd_{name}_pascal_context")
    found = sum(p.numel() for p in model.backbone.parameters())
    assert found == pytest.approx(parameters, rel=0.003)
    shapes = model.backbone.output_shape()
    assert [(shapes[f"res{k}"].channels, shapes[f"res{k}"].stride) for k in (2, 3, 4, 5)] == [
        (192, 4),
        (384, 8),
        (768, 16),
        (1536, 32),
    ]
    declared = model_zoo.get_config(f"HFGD/hfgd_{name}_pascal_context").model.sem_seg_head
    for key, node in declared.input_shape.items():
        assert (node.channels, node.stride) == (shapes[key].channels, shapes[key].stride)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("hfgd_swin_l_os4_pascal_context", (513, 513), [129, 65, 33, 17]),
        ("hfgd_convnext_l_os4_pascal_context", (512, 512), [128, 64, 32, 16]),
        ("hfgd_convnextv2_l_os4_pascal_context", (512, 512), [128, 64, 32, 16]),
        ("hfgd_r50_os2_cityscapes", (513, 1025), [129, 65, 33, 17]),
    ],
)
@torch.no_grad()
def test_crops_of_the_recipe_fit_the_backbone(name, size, sides):
    _, _, model = built(name)
    maps = model.eval().backbone(torch.empty(1, 3, *size, device="meta"))
    assert [maps[f"res{k}"].shape[2] for k in (2, 3, 4, 5)] == sides
    model.train()


def test_ablations_differ_from_hfgd_in_one_thing():
    def parameters(name):
        _, _, model = built(f"{name}_pascal_context")
        return {key: tuple(p.shape) for key, p in model.named_parameters()}

    full = parameters("hfgd_r50_sfpn")
    without = parameters("hfgd_r50_sfpn_no_axial_attention")
    assert {key for key in full if key not in without} == {
        key for key in full if key.startswith("sem_seg_head.hfgm.")
    }
    lead = parameters("hfgd_r50_os4_lead_3x3")
    changed = {key for key, shape in parameters("hfgd_r50_os4").items() if lead[key] != shape}
    assert len(changed) == 2
    assert all(lead[key][2:] == (3, 3) for key in changed)


@pytest.mark.parametrize("name", [n for n in NAMES if f"HFGD/{n}" in model_zoo.list_models("yaml")])
def test_both_kinds_change_images_alike(name):
    """Down to the numbers inside nested steps."""
    by_yaml = mappers.from_cfg(model_zoo.get_config(f"HFGD/{name}", "yaml"), True)
    by_lazy = instantiate(model_zoo.get_config(f"HFGD/{name}").dataloader.train.mapper)
    found = [everything(each.augmentations.augs) for each in (by_yaml, by_lazy)]
    assert found[0] == found[1]
    assert found[0][0][1]["scale_step"] == 0.25
