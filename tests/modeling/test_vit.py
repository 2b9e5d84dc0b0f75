"""EVA-02's vision transformer: against its description, timm's model, and itself at other sizes."""

import inspect

import pytest
import torch
from detectron2.modeling import build_backbone
from timm.models.eva import Eva
from torch import nn

from d2dense import config
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.errors import UserError
from d2dense.modeling import EVA02ViT
from d2dense.modeling.vit import rotary_table
from d2dense.solver.optim import param_groups
from tests.modeling import plain_vit

HEADS = 2
TINY = {
    "channels": 24,
    "depth": 3,
    "heads": HEADS,
    "window": 3,
    "global_blocks": (1,),
    "position_side": 4,
    "drop_path_rate": 0.0,
}


def tiny(**options):
    """A small model whose every parameter is random."""
    torch.manual_seed(0)
    model = EVA02ViT(**{**TINY, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(std=scale)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


class OneMap(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)["res4"]


@pytest.mark.parametrize(
    ("window", "rotary_side"), [(None, None), (None, 7), (3, None), (6, None)], ids=str
)
def test_a_block_is_what_its_description_says(window, rotary_side):
    """Whole maps, of which the rotary embedding counts the own size or a fixed one; windows that do
    not divide the map; windows larger than it.
    """
    model = tiny(window=window or 3)
    block = model.blocks[1 if window is None else 0]
    h, w = 4, 5
    x = torch.randn(2, h, w, 24, generator=torch.Generator().manual_seed(1))
    side = window or rotary_side
    table = rotary_table(window or h, window or w, 12, x, side=side)
    expected = [
        plain_vit.block(each, block.state_dict(), HEADS, window=window, rotary_side=rotary_side)
        for each in x
    ]
    torch.testing.assert_close(block(x, rope=table), torch.stack(expected), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("rotary_side", [None, 6])
def test_the_whole_model_is_patches_positions_blocks_and_a_norm(rotary_side):
    model = tiny(rotary_side=rotary_side)
    image = torch.randn(1, 3, 60, 80)
    filled = torch.zeros(1, 3, 64, 80)
    filled[:, :, :60] = image
    weight = model.patch_embed.weight.flatten(1)
    patches = filled[0].unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(2)
    x = patches @ weight.T + model.patch_embed.bias
    x = x + plain_vit.resized(model.position_embedding[0, 1:].reshape(4, 4, -1), 4, 5)
    for i, block in enumerate(model.blocks):
        window = None if i == 1 else 3
        state = block.state_dict()
        x = plain_vit.block(x, state, HEADS, window=window, rotary_side=rotary_side)
    x = nn.functional.layer_norm(x, (24,), model.norm.weight, model.norm.bias, eps=1e-5)
    found = model(image)["res4"]
    assert found.shape == (1, 24, 4, 5)
    torch.testing.assert_close(found[0], x.permute(2, 0, 1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [(4, 4), (3, 9), (1, 1)])
def test_positions_are_resized_to_the_grid_of_tokens(size):
    model = tiny()
    expected = plain_vit.resized(model.position_embedding[0, 1:].reshape(4, 4, -1), *size)
    torch.testing.assert_close(model._positions(*size)[0], expected, rtol=1e-5, atol=1e-6)


def test_without_windows_it_is_timms_eva02():
    model = tiny(global_blocks=(0, 1, 2))
    other = Eva(
        img_size=(64, 96),
        patch_size=16,
        num_classes=0,
        global_pool="",
        embed_dim=24,
        depth=3,
        num_heads=HEADS,
        qkv_fused=False,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        class_token=False,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
    ).eval()
    other.norm = nn.LayerNorm(24)  # eps 1e-5
    state = {k.replace("attn.attention.", "attn."): v for k, v in model.state_dict().items()}
    state |= {f"patch_embed.proj.{k}": state.pop(f"patch_embed.{k}") for k in ("weight", "bias")}
    del state["position_embedding"]
    state["pos_embed"] = model._positions(4, 6).flatten(1, 2)
    other.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96)
    expected = other.forward_features(x).reshape(2, 4, 6, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x)["res4"], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotary_side", [None, 6])
def test_a_trace_is_right_at_other_sizes(rotary_side):
    model = OneMap(tiny(rotary_side=rotary_side))
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    for size in [(64, 64), (33, 130), (16, 16)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


def test_filled_up_images_have_the_same_map():
    model = tiny()
    x = torch.randn(1, 3, 17, 33)
    filled = nn.functional.pad(x, (0, 15, 0, 15))
    assert torch.equal(model(x)["res4"], model(filled)["res4"])
    assert model(x)["res4"].shape == (1, 24, 2, 3)
    shape = model.output_shape()["res4"]
    assert (shape.channels, shape.stride) == (24, 16)


def test_drop_path_rises_linearly_and_drops_halves_of_a_block_by_image():
    model = tiny(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    block = model.blocks[4].train()
    x = torch.randn(1, 3, 3, 24).expand(64, -1, -1, -1)
    out = block(x, rope=rotary_table(3, 3, 12, x))
    kinds = torch.unique(out.flatten(1).round(decimals=3), dim=0)
    assert len(kinds) == 4  # attention and perceptron, each there or not
    assert any(torch.equal(each, x[0]) for each in out)


def test_recomputed_activations_give_the_same_gradients():
    model = tiny().train().requires_grad_()
    x = torch.randn(1, 3, 48, 64)
    model(x)["res4"].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert enable_activation_checkpointing(model) == 3
    model(x)["res4"].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert not expected["position_embedding"][:, 0].any()  # the class token's


def test_autocast_keeps_the_values():
    model = tiny()
    x = torch.randn(1, 3, 48, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)["res4"]
    torch.testing.assert_close(found.float(), model(x)["res4"], rtol=0, atol=0.15)


def test_layer_decay_and_weight_decay_of_vit_l():
    """Section 8.2 of the reference: 26 groups, and what is not decayed."""
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": EVA02ViT(), "neck": nn.Conv2d(1, 1, 1)})
    backbone = model["backbone"]
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(304.2e6, abs=0.05e6)
    groups = param_groups(
        model, base_lr=1.0, weight_decay=0.01, weight_decay_1d=0.0, layer_decay=0.8
    )
    settings = {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len({g["lr"] for g in groups}) == 26
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("backbone.patch_embed", "backbone.position_embedding")):
            layer = 0
        else:
            layer = 25
        lr, decay = settings[parameter]
        assert lr == pytest.approx(0.8 ** (25 - layer)), name
        one_dimensional = name.endswith((".bias", "norm.weight", "norm1.weight", "norm2.weight"))
        assert decay == (0.0 if one_dimensional else 0.01), name


def test_both_kinds_of_config_build_the_same():
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "EVA02ViT"
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(EVA02ViT.__init__).parameters.items()
        if name != "self"
    }
    assert EVA02ViT.from_config(cfg, None) == defaults
    for key, value in TINY.items():
        cfg.MODEL.VIT["DROP_PATH" if key == "drop_path_rate" else key.upper()] = value
    torch.manual_seed(3)
    first = build_backbone(cfg).state_dict()
    torch.manual_seed(3)
    second = EVA02ViT(**TINY).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "MODEL.VIT.CHANNELS"),
        ({"global_blocks": (3,)}, "0 to 2"),
        ({"size_divisibility": 24}, "patch of 16"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        EVA02ViT(**{**TINY, **options})
