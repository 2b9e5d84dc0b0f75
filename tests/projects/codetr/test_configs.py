"""Configs: yaml equals lazy, every recipe of the paper's tables, the tools and a short training."""

import re

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.engine.experiment import experiment
from d2dense.modeling.detr import DeformableDETR
from tests.projects import parity
from tests.projects.parity import on_meta

LAZY = [name for name in model_zoo.list_models("lazy") if name.startswith("CoDETR/")]
BOTH = [name for name in model_zoo.list_models("yaml") if name.startswith("CoDETR/")]
TINY = [name for name in BOTH if "tiny" in name]
# of the mapper: what is done to objects, which tests do not read
ONLY_IN_TRAINING = ("use_instance_mask", "min_box_side")
FIXED = ["deformable_detr_r50_1x", "co_deformable_detr_r50_1x", "co_dino_5scale_r50_1x"]


def test_names_that_users_rely_on_have_both_kinds():
    assert {f"CoDETR/{name}" for name in FIXED} <= set(BOTH)
    assert set(BOTH) <= set(LAZY)
    assert len(TINY) == 5


@pytest.mark.parametrize("name", BOTH)
def test_both_kinds_give_the_same_model_and_run(name):
    parity.check_model_and_run(name)
    assert "selection" in str(parity.held_by(on_meta(name)).keys())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    parity.check_data(name, train=train, ignored=() if train else ONLY_IN_TRAINING)


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    parity.check_start(name)


# ------------------------------------------------ recipes (sections 8 and 10 of the reference)

IMAGES = {"coco": 118_287, "lvis": 100_170}
# name -> (images, classes, epochs, drops, batch, lr, weight decay, heads, queries)
RECIPES = {
    "deformable_detr_r50_1x": ("coco", 80, 12, [11], 32, 2e-4, 1e-4, 0, 300),
    "deformable_detr_r50_rcnn_atss_3x": ("coco", 80, 36, [30], 32, 2e-4, 1e-4, 2, 300),
    "deformable_detr_r50_mask_rcnn_3x": ("coco", 80, 36, [30], 32, 2e-4, 1e-4, 1, 300),
    "deformable_detr_r50_50ep": ("coco", 80, 50, [40], 32, 2e-4, 1e-4, 0, 300),
    "conditional_detr_r50_c5_3x": ("coco", 80, 36, [30], 16, 1e-4, 1e-4, 0, 300),
    "dab_detr_r50_c5_rcnn_atss_3x": ("coco", 80, 36, [30], 16, 1e-4, 1e-4, 2, 300),
    "deformable_detr_pp_r50_six_heads_1x": ("coco", 80, 12, [11], 32, 2e-4, 1e-4, 6, 300),
    "deformable_detr_pp_r50_hybrid_1x": ("coco", 80, 12, [11], 32, 2e-4, 1e-4, 0, 300),
    "h_deformable_detr_r50_1x": ("coco", 80, 12, [11], 16, 2e-4, 1e-4, 0, 300),
    "h_deformable_detr_swin_l_3x": ("coco", 80, 36, [30], 16, 2e-4, 0.05, 0, 900),
    "dino_5scale_r50_1x": ("coco", 80, 12, [11], 16, 2e-4, 1e-4, 0, 900),
    "co_deformable_detr_r50_1x": ("coco", 80, 12, [11], 16, 2e-4, 1e-4, 2, 300),
    "co_deformable_detr_swin_t_3x": ("coco", 80, 36, [30], 16, 2e-4, 0.05, 2, 300),
    "co_deformable_detr_swin_l_3x": ("coco", 80, 36, [30], 16, 2e-4, 0.05, 2, 900),
    "co_dino_5scale_r50_1x": ("coco", 80, 12, [11], 16, 2e-4, 1e-4, 2, 900),
    "co_dino_5scale_swin_l_2x": ("coco", 80, 24, [20], 16, 2e-4, 1e-4, 2, 900),
    "co_dino_5scale_r50_9encoder_lsj_3x": ("coco", 80, 36, [30], 16, 2e-4, 1e-4, 2, 900),
    "co_dino_5scale_swin_l_lsj_lvis_3x": ("lvis", 1203, 36, [30], 16, 2e-4, 1e-4, 2, 900),
    "co_dino_5scale_swin_l_o365_coco": ("coco", 80, 16, [8], 16, 1e-4, 1e-4, 2, 900),
    "co_dino_5scale_swin_l_o365_lvis": ("lvis", 1203, 16, [8], 16, 1e-4, 1e-4, 2, 900),
    "co_dino_5scale_vit_l_o365_coco": ("coco", 80, 12, [7], 16, 5e-5, 0.01, 2, 1500),
    "co_dino_5scale_vit_l_o365_lvis": ("lvis", 1203, 16, [9, 15], 16, 5e-5, 0.05, 2, 900),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_paper(name):
    data, classes, epochs, drops, batch, lr, weight_decay, heads, queries = RECIPES[name]
    cfg = model_zoo.get_config(f"CoDETR/{name}")
    assert abs(cfg.train.max_iter - epochs * IMAGES[data] / batch) <= 0.5
    marks = cfg.lr_multiplier.scheduler.milestones
    assert [round(each * batch / IMAGES[data]) for each in marks] == drops
    assert cfg.dataloader.train.total_batch_size == batch
    assert not cfg.dataloader.train.dataset.filter_empty
    assert cfg.dataloader.train.dataset.names.startswith(data)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (lr, weight_decay)
    assert cfg.train.clip_gradients == {
        "enabled": True,
        "clip_type": "full_model",
        "clip_value": 0.1,
        "norm_type": 2.0,
    }
    assert cfg.model.num_classes == classes
    found = on_meta(f"CoDETR/{name}")
    assert len(getattr(found, "auxiliary_heads", ())) == heads
    sources = found.queries.state_dict().values()
    assert any(value.shape[0] == queries for value in sources if value.ndim == 2)
    hybrid = found.one_to_many
    assert (hybrid is not None) == (name.startswith("h_") or "hybrid" in name)
    if hybrid is not None:
        assert len(hybrid.content.weight) == 1500
        assert (hybrid.repeats, hybrid.weight) == (6, 1.0)


@pytest.mark.parametrize("name", ["co_deformable_detr_r50_1x", "co_dino_5scale_r50_1x"])
def test_weight_decay_spares_nothing_and_some_rates_are_slower(name):
    found = experiment(model_zoo.get_config(f"CoDETR/{name}"), device="cpu")
    model = on_meta(f"CoDETR/{name}")
    rates = {}
    for names, lr, decay in each_group(found, model):
        assert decay == 1e-4
        rates |= dict.fromkeys(names, lr)
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for parameter, lr in rates.items():
        slow = parameter.startswith("backbone.")
        slow |= "sampling_offsets" in parameter and "deformable" in name
        assert lr == pytest.approx(2e-5 if slow else 2e-4), parameter


def each_group(found, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in found.build_optimizer(model).param_groups:
        yield [names[each] for each in group["params"]], group["lr"], group["weight_decay"]


def test_rates_of_the_vision_transformer_fall_from_block_to_block():
    name = "CoDETR/co_dino_5scale_vit_l_o365_coco"
    found, model = experiment(model_zoo.get_config(name), device="cpu"), on_meta(name)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    seen = 0
    for names, lr, decay in each_group(found, model):
        for parameter in names:
            block = re.match(r"backbone\.blocks\.(\d+)\.", parameter)
            layer = 25
            if block:
                layer = int(block[1]) + 1
            elif parameter.startswith(("backbone.patch_embed", "backbone.position_embedding")):
                layer = 0
            assert lr == pytest.approx(5e-5 * 0.8 ** (25 - layer)), parameter
            assert decay == (0.0 if shapes[parameter] <= 1 else 0.01), parameter
            seen += 1
    assert seen == len(shapes)


JITTERED = [name for name in LAZY if "lsj" in name or name.endswith("o365_lvis")]


@pytest.mark.parametrize("name", JITTERED)
def test_jittered_models_see_their_padding(name):
    cfg = model_zoo.get_config(name)
    size = 1536 if "o365" in name else 1280 if "swin_l" in name else 1024
    augmentation = cfg.dataloader.train.mapper.augmentations
    assert (augmentation.image_size, list(augmentation.pad_value)) == (size, [114.0] * 3)
    assert (augmentation.min_scale, augmentation.max_scale) == (0.1, 2.0)
    assert cfg.dataloader.train.copy_paste.max_objects == 100
    assert cfg.dataloader.train.mapper.use_instance_mask
    test = cfg.dataloader.test.mapper.augmentations
    assert (list(test.min_size), test.max_size) == ([size], size)
    assert not cfg.model.mask_padding
    assert (cfg.model.square, cfg.model.pad_value) == (size, 114.0)
    lvis = "lvis" in name
    assert (cfg.dataloader.train.get("sampler") == "repeat_factor") == lvis
    assert ("federated" in cfg.model.criterion) == lvis


def test_without_heads_the_detector_is_the_base():
    cfg = model_zoo.get_config("CoDETR/co_deformable_detr_tiny_shapes")
    inference = config.build_model(cfg, device="cpu").inference_model()
    base = model_zoo.get_model("CoDETR/deformable_detr_tiny_shapes")
    assert type(inference) is DeformableDETR
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (inference, base))
    assert ours == theirs


def test_heads_on_the_simple_pyramid_know_its_strides():
    """Yaml: the pyramid's levels lie around the one map of stride 16."""
    cfg = model_zoo.get_config("CoDETR/co_dino_5scale_r50_1x", kind="yaml")
    cfg.MODEL.BACKBONE.NAME = "EVA02ViT"
    cfg.MODEL.VIT.DEPTH = 1
    cfg.MODEL.VIT.GLOBAL_BLOCKS = (0,)
    cfg.MODEL.DETR.IN_FEATURES = ["res4"]
    cfg.MODEL.DETR.NECK = "simple_pyramid"
    with torch.device("meta"):
        model = config.build_model(cfg, device="meta")
    assert [head.strides for head in model.auxiliary_heads] == [(4, 8, 16, 32, 64, 128)] * 2
