"""Official names of backbones and necks: none missing, none too many, and the recorded maps."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from codetr.official_backbones import constants, names
from d2dense import config
from d2dense.modeling import EVA02ViT, Swin
from d2dense.modeling.detr import ChannelMapper
from d2dense.modeling.necks import SimplePyramid
from tests.projects.codetr import official_weights as rules

official_names = pytest.mark.skipif(not rules.NAMES.is_file(), reason=f"no {rules.NAMES}")
SWIN_L = {"embed_dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "window": 12}
LVIS = {"window": 16, "global_blocks": range(2, 24, 3), "rotary_side": 96}


def resnet(*features):
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(features)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    return build_backbone(cfg)


def mapped(backbone, levels):
    shapes = backbone.output_shape()
    return backbone, ChannelMapper(input_shape=shapes, in_features=list(shapes), levels=levels)


MODELS = {
    "co_deformable_detr_r50_1x": lambda: mapped(resnet("res3", "res4", "res5"), 4),
    "co_dino_5scale_r50_1x": lambda: mapped(resnet("res2", "res3", "res4", "res5"), 5),
    "co_dino_5scale_swin_large": lambda: mapped(Swin(**SWIN_L), 5),
    "co_dino_5scale_vit_large": lambda: (EVA02ViT(), SimplePyramid()),
    "co_dino_5scale_lsj_vit_large_lvis": lambda: (EVA02ViT(**LVIS), SimplePyramid()),
}


def part(table, prefix):
    return {k.removeprefix(prefix): v for k, v in table.items() if k.startswith(prefix)}


@official_names
@pytest.mark.parametrize("variant", MODELS)
def test_every_tensor_has_its_name_and_shape(variant):
    with torch.device("meta"):
        modules = MODELS[variant]()
    for prefix, module in zip(("backbone.", "neck."), modules):
        state, pairs, computed = module.state_dict(), names(module), constants(module)
        assert pairs.keys() == state.keys()
        found = {theirs: state[ours] for ours, theirs in pairs.items()}
        assert len(found) == len(pairs)
        assert not found.keys() & computed.keys()
        found |= computed
        expected = part(rules.tables()[variant], prefix)
        assert found.keys() == expected.keys()
        for name, (shape, dtype) in expected.items():
            assert list(found[name].shape) == shape, name
            assert str(found[name].dtype) == f"torch.{dtype}", name


def test_names_of_a_transformer_block_say_what_the_parts_do():
    """The gate is what SiLU is applied to: w1; the norm of the hidden layer is not that of the
    block.
    """
    model = EVA02ViT(channels=16, depth=1, heads=2, global_blocks=(), position_side=2)
    pairs = {k: v for k, v in names(model).items() if "bias" in k or "proj" in k or "mlp" in k}
    attention, mlp = "blocks.0.attn.attention", "blocks.0.mlp"
    expected = {
        "patch_embed.bias": "patch_embed.proj.bias",
        "norm.bias": "out_norm.bias",
        "blocks.0.norm1.bias": "blocks.0.norm1.bias",
        "blocks.0.norm2.bias": "blocks.0.norm2.bias",
        **{
            f"{attention}.{x}_proj.weight": f"blocks.0.attn.{x}_proj.weight"
            for x in ("q", "k", "v")
        },
        f"{attention}.q_proj.bias": "blocks.0.attn.q_bias",
        f"{attention}.v_proj.bias": "blocks.0.attn.v_bias",
        f"{attention}.proj.weight": "blocks.0.attn.proj.weight",
        f"{attention}.proj.bias": "blocks.0.attn.proj.bias",
    }
    for ours, theirs in {"fc1_g": "w1", "fc1_x": "w2", "norm": "ffn_ln", "fc2": "w3"}.items():
        for kind in ("weight", "bias"):
            expected[f"{mlp}.{ours}.{kind}"] = f"{mlp}.{theirs}.{kind}"
    assert pairs == expected
    gate = model.blocks[0].mlp
    nn.init.zeros_(gate.fc1_g.weight)
    nn.init.zeros_(gate.fc1_g.bias)
    nn.init.constant_(gate.norm.bias, 0.0)
    assert not (gate(torch.randn(3, 16)) - gate.fc2.bias).any()  # SiLU(0) = 0


def test_rotary_tables_hold_the_angles_row_by_row():
    model = EVA02ViT(
        channels=16, depth=2, heads=2, window=3, global_blocks=(1,), position_side=2, rotary_side=5
    )
    tables = constants(model)
    assert len(tables) == 8
    for prefix, side in (("rope_win", 3), ("rope_glb", 5)):
        block = f"blocks.{0 if side == 3 else 1}.attn.rope"
        for kind, function in (("cos", math.cos), ("sin", math.sin)):
            expected = torch.empty(side, side, 8)
            for y in range(side):
                for x in range(side):
                    for c in range(8):
                        place = y if c < 4 else x
                        frequency = 10000 ** (-2 * (c % 4 // 2) / 4)
                        expected[y, x, c] = function(place / side * 16 * frequency)
            found = tables[f"{prefix}.freqs_{kind}"]
            torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=3e-6)
            assert torch.equal(found, tables[f"{block}.freqs_{kind}"])


def test_whole_maps_of_any_size_have_no_table():
    model = EVA02ViT(channels=16, depth=2, heads=2, window=3, global_blocks=(1,), position_side=2)
    assert sorted({name.split(".freqs")[0] for name in constants(model)}) == [
        "blocks.0.attn.rope",
        "rope_win",
    ]


def test_other_modules_have_no_names():
    with pytest.raises(ValueError, match="Conv2d"):
        names(nn.Conv2d(1, 1, 1))


@official_names
@pytest.mark.skipif(not rules.FOLDER.is_dir(), reason=f"no {rules.FOLDER}")
@torch.no_grad()
def test_the_recorded_maps_of_resnet_and_channel_mapper():
    variant = "co_deformable_detr_r50_1x"
    arrays, meta = rules.recording("eval_co_deformable_r50")
    backbone, neck = MODELS[variant]()
    table = rules.tables()[variant]
    for prefix, module in (("backbone.", backbone), ("neck.", neck)):
        state = {
            ours: rules.weight(prefix + theirs, table[prefix + theirs][0])
            for ours, theirs in names(module).items()
        }
        module.load_state_dict(state)
        module.eval()
    x = rules.images(meta["image_seed"], [(192, 256)])
    maps = list(backbone(x).values())
    for i, each in enumerate(maps):
        step = max(1, each.shape[2] // 8)
        found = each[:, :: each.shape[1] // 16, ::step, ::step].numpy()
        np.testing.assert_allclose(found, arrays[f"backbone_{i}"], rtol=0, atol=1e-4)
    for i, each in enumerate(neck(maps)):
        step = max(1, each.shape[2] // 8)
        found = each[:, ::16, ::step, ::step].numpy()
        np.testing.assert_allclose(found, arrays[f"neck_{i}"], rtol=0, atol=1e-4)
