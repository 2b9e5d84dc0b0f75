"""Activation checkpointing: which modules take part, and that nothing but memory changes."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling.backbone.mvit import MViT
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import ViT
from torch import nn

from d2dense.engine.recompute import blocks, enable_activation_checkpointing
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine.fakes import FakeExperiment


def resnet(norm):
    stages = ResNet.make_default_stages(18, norm=norm)
    for stage in stages:  # an eighth of the width
        del stage[1:]
    return ResNet(BasicStem(norm=norm), stages, out_features=["res2", "res5"])


def vit():
    return ViT(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        drop_path_rate=0.5,
        window_size=2,
        window_block_indexes=(0,),
        residual_block_indexes=(2,),
        use_rel_pos=True,
    )


def swin():
    return SwinTransformer(
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=2,
        drop_rate=0.2,
        attn_drop_rate=0.2,
        drop_path_rate=0.5,
        out_indices=(0, 1),
    )


def mvit():
    return MViT(
        img_size=32,
        embed_dim=8,
        depth=3,
        num_heads=1,
        last_block_indexes=(0, 1, 2),
        drop_path_rate=0.5,
        out_features=("scale2", "scale4"),
    )


def timm_model(name):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=3, drop_path_rate=0.3, img_size=32)


class Dropping(nn.Module):
    """A transformer layer of PyTorch, which takes keyword arguments."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        return self.layer(tokens, src_key_padding_mask=mask)


MODELS = {
    "resnet with frozen norms": (lambda: resnet("FrozenBN"), 5),
    "resnet with batch norms": (lambda: resnet("BN"), 5),
    "detectron2 ViT": (vit, 3),
    "detectron2 Swin": (swin, 4),
    "detectron2 MViT": (mvit, 3),
    "PyTorch transformer": (Dropping, 1),
}


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def step(model, images, dtype):
    """Return the outputs of two forwards, the gradients of both backwards and the next number."""
    torch.manual_seed(1)
    found = []
    for each in images:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = tensors(model(each))
        sum(output.float().square().sum() for output in outputs).backward()
        found += outputs
    return found, {n: p.grad for n, p in model.named_parameters()}, torch.rand(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_statistics_and_draws_are_equal_to_the_bit(name, dtype):
    build, count = MODELS[name]
    torch.manual_seed(0)
    plain = build().train()
    recomputing = copy.deepcopy(plain)
    assert enable_activation_checkpointing(recomputing) == count
    assert list(recomputing.state_dict()) == list(plain.state_dict())
    images = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    expected, found = (step(model, images, dtype) for model in (plain, recomputing))
    for one, two in zip(found[0], expected[0]):
        assert torch.equal(one, two)
    assert any(gradient is not None for gradient in expected[1].values())
    for key, gradient in expected[1].items():
        if gradient is None:
            assert found[1][key] is None
        else:
            assert torch.equal(found[1][key], gradient), key
    assert torch.equal(found[2], expected[2])
    for key, buffer in plain.named_buffers():
        assert torch.equal(recomputing.get_buffer(key), buffer), key


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_of_timm(name):
    plain = timm_model(name)
    recomputing = copy.deepcopy(plain)
    assert enable_activation_checkpointing(recomputing) == 1
    images = [torch.randn(2, 3, 32, 32)]
    calls = []
    for block in blocks(recomputing):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = (step(model, images, None) for model in (plain, recomputing))
    assert len(calls) == 2 * len(blocks(recomputing)) > 0
    for key, gradient in expected[1].items():
        assert torch.equal(found[1][key], gradient), key


def test_activations_are_not_kept():
    """Counted where autograd keeps them."""

    def kept(model):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(2, 3, 64, 64))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    plain = resnet("BN").train()
    recomputing = copy.deepcopy(plain)
    enable_activation_checkpointing(recomputing)
    assert kept(recomputing) < 0.4 * kept(plain)


def test_blocks_run_once_in_evaluation_and_twice_in_training():
    model = nn.Sequential(BasicBlock(4, 4, norm="BN"))
    enable_activation_checkpointing(model)
    calls = []
    model[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randn(1, 4, 5, 5)
    model(inputs).sum().backward()
    assert len(calls) == 2
    model.eval()
    model(inputs)
    assert len(calls) == 3


class Switch(nn.Module):
    """As timm's models have it."""

    def __init__(self, *, norm=False, able=True):
        super().__init__()
        self.block = BasicBlock(4, 4, norm="BN" if norm else "FrozenBN")
        self.able = able
        self.on = False

    def set_grad_checkpointing(self, enable=True):
        assert self.able, "gradient checkpointing not supported"
        self.on = enable


def test_modules_that_offer_it_do_it_in_their_own_way_unless_it_would_be_wrong():
    def has_wrapped_block(module):
        return "forward" in vars(module.block)

    model = nn.ModuleList([Switch(), Switch(norm=True), Switch(able=False)])
    assert enable_activation_checkpointing(model) == 3
    assert [each.on for each in model] == [True, False, False]
    assert [has_wrapped_block(each) for each in model] == [False, True, True]


def test_a_model_without_blocks_is_told_and_the_trainer_asks_for_it(tmp_path):
    experiment = FakeExperiment(tmp_path, activation_checkpointing=True)
    with pytest.raises(UserError, match="activation_checkpointing"):
        Trainer(experiment)
    build = experiment.build_model

    def with_switch():
        model = build()
        model.switch = Switch()
        return model

    experiment.build_model = with_switch
    assert Trainer(experiment).model.switch.on
