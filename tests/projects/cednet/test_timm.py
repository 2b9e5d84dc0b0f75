"""CEDNet through timm: by name, as feature maps, as a classifier, with weights of other code."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

import cednet
from cednet import CEDNetClassifier, CEDNetTrunk, official
from cednet.timm_models import TimmCEDNet, checkpoint_filter_fn
from d2dense.layers import Residual
from d2dense.modeling import ImageClassifier, TimmBackbone

# parameters without auxiliary heads, measured on the official code
PARAMS = {
    "cednet_next_tiny": 33_826_152,
    "cednet_next_small": 56_174_824,
    "cednet_next_base": 94_615_528,
    "cednet_swin_tiny": 32_178_833,
    "cednet_res50": 34_387_048,
}
TINY = {"widths": (8, 16, 24, 32), "blocks": (1, 1, 1), "num_stages": 2, "first_blocks": 1}


@pytest.fixture
def tiny(monkeypatch):
    """``cednet_next_tiny`` with fewer channels and blocks."""
    family, _ = cednet.timm_models.TRUNKS["next_tiny"]
    monkeypatch.setitem(cednet.timm_models.TRUNKS, "next_tiny", (family, TINY))
    return "cednet_next_tiny"


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_timm_lists_them():
    assert set(timm.list_models("cednet*")) == {*PARAMS, "cednet_cswin_tiny"}
    assert timm.is_model("cednet_next_tiny")


@pytest.mark.parametrize("name", PARAMS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]
    assert resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cednet_next_tiny", (224, 224)),
        ("cednet_next_small", (97, 130)),
        ("cednet_cswin_tiny", (97, 130)),
        ("cednet_swin_tiny", (224, 224)),
        ("cednet_res50", (97, 130)),
    ],
)
def test_sizes_of_feature_maps(name, size):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True).eval()
        maps = model(torch.empty(1, 3, *size))
    info = model.feature_info
    assert info.reduction() == [4, 8, 16, 32]
    expected = [
        (1, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        for channels, stride in zip(info.channels(), info.reduction())
    ]
    assert [tuple(each.shape) for each in maps] == expected


@torch.no_grad()
def test_feature_maps_are_those_of_the_backbone(tiny):
    model = timm.create_model(tiny, features_only=True, out_indices=(1, -1)).eval()
    assert not any(name.startswith("model.head") for name in model.state_dict())
    x = images(2, 3, 50, 70)
    features = ["c2", "c3", "c4", "c5"]
    backbone = cednet.CEDNet(trunk=model.model.trunk, out_features=features).eval()
    expected = list(backbone(x).values())
    found = model(x)
    assert len(found) == 2
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[3])
    last, all_of_them = timm.create_model(tiny).eval().forward_intermediates(x)
    assert len(all_of_them) == 4
    assert last.shape == (2, 32, 2, 3)
    with pytest.raises(IndexError):
        model.model.forward_intermediates(x, indices=[4])


def test_backbones_of_detectors_take_them(tiny):
    backbone = TimmBackbone(name=tiny, drop_path_rate=0.1, out_features=["res3", "res5"]).eval()
    maps = backbone(images(1, 3, 64, 64))
    shapes = {name: tuple(each.shape) for name, each in maps.items()}
    assert shapes == {"res3": (1, 16, 8, 8), "res5": (1, 32, 2, 2)}


def test_classifier_conventions(tiny):
    model = timm.create_model(tiny, num_classes=7, in_chans=4, drop_path_rate=0.3, drop_rate=0.2)
    rates = [m.drop_path for m in model.modules() if isinstance(m, Residual)]
    assert max(rates, default=0) == pytest.approx(0.3)
    model.eval()
    x = images(2, 4, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    embedded = model.forward_head(features, pre_logits=True)
    assert embedded.shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.get_classifier()(embedded))
    model.reset_classifier(0)
    assert torch.equal(model(x), embedded)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    with pytest.raises(ValueError, match="avg"):
        model.reset_classifier(3, "max")
    same = timm.create_model(tiny, num_classes=0)
    assert same(images(1, 3, 32, 32)).shape == (1, 2048)


def test_training_gives_one_tensor_and_gradients_everywhere(tiny):
    model = timm.create_model(tiny, num_classes=5).train()
    x = images(2, 3, 32, 32)
    model(x).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []  # the decoder of the first stage feeds the second
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    assert all(torch.allclose(p.grad, plain[name]) for name, p in model.named_parameters())


def test_layer_decay_of_timms_optimizers(tiny):
    model = timm.create_model(tiny)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scales |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
    order = ["trunk.stem.0.conv", "trunk.down.conv", "trunk.stages.0.encoder.down.0.conv"]
    order += ["trunk.stages.1.encoder.down.0.conv"]
    found = [scales[f"{name}.weight"] for name in order]
    assert found == sorted(found)
    assert len(set(found)) == 4
    assert scales["head.linear.weight"] == 1


@torch.no_grad()
def test_scripted_equals_eager_at_other_sizes(tiny):
    model = timm.create_model(tiny, num_classes=7).eval()
    scripted = torch.jit.script(model)
    for shape in ((1, 3, 64, 64), (2, 3, 40, 70)):
        assert torch.allclose(scripted(images(*shape)), model(images(*shape)), atol=1e-6)


# ------------------------------------------------ weights of other code


def classifier(classes=5):
    torch.manual_seed(0)
    trunk = CEDNetTrunk(last_decoder=False, drop_path=0.0, **TINY)
    return CEDNetClassifier(trunk=trunk, num_classes=classes).eval()


@torch.no_grad()
def test_a_checkpoint_of_the_launcher_loads(tiny, tmp_path):
    network = classifier()
    model = ImageClassifier(network=network, num_classes=5)
    path = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    overlay = {"file": str(path), "num_classes": 5}
    found = timm.create_model(
        tiny, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
    ).eval()
    x = images(2, 3, 64, 64)
    assert torch.equal(found(x), network(x))
    # with another number of classes all but the last layer
    other = timm.create_model(tiny, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2)
    assert torch.equal(other.head.conv.conv.weight, network.heads[-1].conv.conv.weight)
    assert other.eval()(x).shape == (2, 2)


@torch.no_grad()
def test_official_names_load(tiny):
    network = classifier()
    weights = official.state_dict(network)
    assert "final_layers.0.0.weight" in weights
    found = timm.create_model(tiny, num_classes=5).eval()
    assert isinstance(found, TimmCEDNet)
    found.load_state_dict(checkpoint_filter_fn(weights, found))
    x = images(1, 3, 64, 64)
    assert torch.equal(found(x), network(x))
