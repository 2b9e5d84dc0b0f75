"""The trunk's plan: blocks per stage, stochastic depth, layers, initial weights."""

import math

import pytest
import torch
from torch import nn

from cednet import CEDNet, CEDNetClassifier, CEDNetTrunk, StageClassifier, official
from cednet.official_names import correspondence
from d2dense.layers import Residual
from d2dense.solver.optim import param_groups
from tests.projects.cednet import golden, tiny

needs_meta = pytest.mark.skipif(not golden.train_meta(), reason="no official training facts here")


def block_rates(trunk) -> dict[str, float]:
    """Official name of every block -> its stochastic depth (laterals, always 0, left out)."""
    names = correspondence(trunk, ()).names
    found = {}
    for name, module in trunk.named_modules():
        if isinstance(module, Residual) and ".before." not in name:
            block = name.rpartition(".")[0]
            official_name = names[f"{block}.mlp.fc1.weight"].removesuffix(".pwconv1.weight")
            found[official_name] = module.drop_path
    return found


# ------------------------------------------------ stochastic depth


@needs_meta
@pytest.mark.parametrize("variant", golden.train_meta().get("drop_path", {}))
def test_official_stochastic_depth(variant):
    expected = golden.train_meta()["drop_path"][variant]
    style = "unet" if variant.endswith("unet") else "fpn"
    small = "small" in variant
    trunk = tiny.trunk(
        style=style,
        first_blocks=3,
        blocks=(2, 7, 2) if small else (2, 4, 2),
        num_stages=4 if small else 3,
        drop_path=expected["rate"],
        official_drop_path=True,
    )
    found = block_rates(trunk)
    assert found.keys() == expected["blocks"].keys()
    assert found == pytest.approx(expected["blocks"], abs=1e-6)


@pytest.mark.parametrize("last_decoder", [True, False])
@pytest.mark.parametrize("style", ["fpn", "unet", "hourglass"])
def test_stochastic_depth_grows_in_forward_order(style, last_decoder):
    trunk = tiny.trunk(style=style, blocks=(2, 4, 2), last_decoder=last_decoder, drop_path=0.3)
    order = []
    for name, module in trunk.named_modules():
        if isinstance(module, Residual) and ".before." not in name:
            module.register_forward_pre_hook(lambda module, args: order.append(module.drop_path))
    trunk.eval()(torch.zeros(1, 3, 32, 32))
    steps = len(order) - 1
    assert order == pytest.approx([0.3 * i / steps for i in range(steps + 1)])


def test_dropped_branches_are_whole_images_and_the_mean_stays():
    torch.manual_seed(0)
    residual = Residual(channels=4, layer_scale=0.5, drop_path=0.25).train()
    x, branch = torch.ones(4000, 4, 1, 1), torch.full((4000, 4, 1, 1), 2.0)
    added = (residual(x, branch) - x).detach().flatten(1)
    assert sorted(set(added.flatten().tolist())) == pytest.approx([0.0, 2 * 0.5 / 0.75])
    assert (added == added[:, :1]).all()
    assert float(added.mean()) == pytest.approx(2 * 0.5, abs=0.03)
    assert torch.equal(residual.eval()(x, branch), x + 0.5 * branch)
    with pytest.raises(ValueError, match="drop_path"):
        Residual(channels=4, drop_path=1.0)


# ------------------------------------------------ plan


def test_blocks_of_the_styles():
    def counts(trunk):
        return [
            (
                [len(level) for level in stage.encoder.levels],
                stage.decoder and [len(list(part.children())) for part in stage.decoder.after],
            )
            for stage in trunk.stages
        ]

    assert counts(tiny.trunk(blocks=(2, 5, 2))) == [([2, 5, 2], [0, 0]), ([2, 5, 2], None)]
    for style in ("unet", "hourglass"):
        split = ([1, 2, 2], [3, 1])
        assert counts(tiny.trunk(style=style, blocks=(2, 5, 2))) == [split, split]
    assert counts(tiny.trunk(blocks=((1, 2, 1), (5, 10, 5)), num_stages=None)) == [
        ([1, 2, 1], [0, 0]),
        ([5, 10, 5], None),
    ]
    assert len(tiny.trunk(num_stages=4).stages) == 4


def test_last_decoder_is_a_choice():
    for style, usual in (("fpn", False), ("fpn_convs", False), ("unet", True), ("hourglass", True)):
        assert (tiny.trunk(style=style).stages[-1].decoder is not None) == usual
        for choice in (True, False):
            trunk = tiny.trunk(style=style, last_decoder=choice)
            assert (trunk.stages[-1].decoder is not None) == choice


@pytest.mark.parametrize("mixer", tiny.FAMILIES)
def test_long_range_blocks_are_at_the_coarsest_scale_only(mixer):
    trunk, plain = tiny.trunk(mixer), tiny.trunk(mixer, lr_blocks=False)
    ordinary = {str(type(b.mixer if hasattr(b, "mixer") else b)) for b in trunk.first}
    for net, long_range in ((trunk, True), (plain, False)):
        for stage in net.stages:
            kinds = [
                {str(type(b.mixer if hasattr(b, "mixer") else b)) for b in level}
                for level in stage.encoder.levels
            ]
            assert kinds[0] == kinds[1] == ordinary
            if mixer != "swin":  # whose long-range block has the same mixer
                assert (kinds[2] != ordinary) == long_range
    dilations = [m.dilation for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert dilations.count((3, 3)) == (0 if mixer == "cswin" else 4)
    assert "dilation" not in str(plain)


def test_windows_move_in_every_second_block_of_a_sequence():
    trunk = tiny.trunk("swin", blocks=(2, 3, 2), first_blocks=3)
    shifts = [[b.mixer.shift for b in trunk.first]]
    shifts += [[b.mixer.shift for b in level] for level in trunk.stages[1].encoder.levels]
    assert shifts == [[0, 3, 0], [0, 3], [0, 3, 0], [0, 3]]


# ------------------------------------------------ layers


@needs_meta
@pytest.mark.parametrize(
    ("recipe", "variant", "rate", "options"),
    [
        ("retinanet_next_tiny", "det_retina_next_tiny", 0.95, {}),
        ("retinanet_next_small", "det_retina_next_small", 0.95, {"layer_rule": "half_stage"}),
        ("mask_rcnn_next_tiny", "det_twostage_next_tiny", 0.95, {}),
        ("deformable_detr_next_tiny", "det_defdetr_next_tiny", 0.5, {}),
        ("upernet_next_tiny", "seg_upernet_next_tiny", 0.9, {}),
        (
            "upernet_next_small",
            "seg_upernet_next_small",
            0.9,
            {"layer_rule": "half_stage", "layer_count": 7},
        ),
        ("retinanet_res50", "det_retina_res50", 1.0, {}),
        ("retinanet_swin_tiny", "det_retina_swin_tiny", 0.95, {}),
    ],
)
def test_optimizer_groups_of_the_backbone_are_the_official_ones(recipe, variant, rate, options):
    with torch.device("meta"):
        model = official.build(variant).backbone
    for key, value in _layer_options(model.trunk, **options).items():
        setattr(model.trunk, key, value)
    groups = param_groups(
        model,
        base_lr=1.0,
        weight_decay=0.05,
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        no_decay_names=["gamma"],
        layer_decay=rate,
    )
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = correspondence(model, ()).names
    found = {f"backbone.{names[name]}": by_id[id(p)] for name, p in model.named_parameters()}
    expected = golden.train_meta()["param_groups"][recipe]["params"]
    expected = {name: value for name, value in expected.items() if name.startswith("backbone.")}
    assert found.keys() == expected.keys()
    different = {
        name: (found[name], value)
        for name, value in expected.items()
        if found[name] != pytest.approx(tuple(value))
    }
    assert different == {}


def _layer_options(trunk, layer_rule="stage", layer_count=None):
    """What the constructor makes of the two options; checked against it."""
    other = tiny.trunk(num_stages=len(trunk.stages), layer_rule=layer_rule, layer_count=layer_count)
    return {"layer_rule": other.layer_rule, "num_layers": other.num_layers}


def test_numbers_of_layers():
    assert tiny.trunk(num_stages=3).num_layers == 4
    assert tiny.trunk(num_stages=4, layer_rule="half_stage").num_layers == 9
    assert tiny.trunk(num_stages=3, layer_rule="half_stage").num_layers == 7
    trunk = tiny.trunk(num_stages=4, layer_rule="half_stage", layer_count=7)
    assert trunk.layer_id("stages.3.encoder.levels.2.0.mlp.fc1.weight") == 8
    assert trunk.layer_id("anything.else") is None


# ------------------------------------------------ initial weights


@pytest.mark.parametrize("mixer", tiny.FAMILIES)
def test_initial_weights(mixer):
    net = CEDNet(trunk=tiny.trunk(mixer), out_features=tiny.TWO_STAGE, out_channels=64)
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            area = math.prod(module.weight.shape[2:])
            std = float(module.weight.detach().std())
            expected = 1 / math.sqrt(module.weight.shape[0] * area)
            assert std == pytest.approx(expected, rel=0.3), name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    tables = [p for name, p in net.named_parameters() if "position_bias" in name]
    assert bool(tables) == (mixer == "swin")
    if tables:
        every = torch.cat([each.detach().flatten() for each in tables])
        assert float(every.std()) == pytest.approx(0.02, rel=0.1)


# ------------------------------------------------ classifier


def test_classifier_scores_every_stage_in_training():
    trunk = tiny.trunk(last_decoder=False)
    torch.manual_seed(0)
    heads = [StageClassifier(in_channels=64, num_classes=5) for _ in trunk.stages]
    model = CEDNetClassifier(trunk=trunk, heads=heads)
    x = tiny.images(2, 3, 50, 64)
    scores = model.train()(x)
    assert [tuple(each.shape) for each in scores] == [(2, 5), (2, 5)]
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 5)
    with pytest.raises(ValueError, match="1 classifiers for 2 stages"):
        CEDNetClassifier(trunk=trunk, heads=heads[:1])


@torch.no_grad()
def test_classifier_scales_its_initial_weights():
    heads = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        heads.append(StageClassifier(in_channels=64, num_classes=5, init_scale=scale))
    assert torch.equal(heads[1].linear.weight, 0.25 * heads[0].linear.weight)
    assert torch.equal(heads[1].conv.conv.weight, heads[0].conv.conv.weight)


def test_defaults_are_the_papers_tiny_model():
    with torch.device("meta"):
        trunk = CEDNetTrunk()
    assert sum(p.numel() for p in trunk.parameters()) == 30_718_336
