"""Activations that are computed again in backward: the same results, and less memory."""

from __future__ import annotations

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.engine.experiment import experiment
from d2dense.engine.recompute import enable_activation_checkpointing
from tests.projects.codetr import family


def saved_bytes(model, batch):
    """Losses, gradients, and the bytes of activations that the forward keeps for backward."""
    kept = {}
    mine = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            kept[storage._cdata] = storage
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    size = sum(each.nbytes() for each in kept.values())
    kept.clear()
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, size


@family.every
def test_recomputed_activations(base, heads):
    """Of the backbone's blocks, the encoder's and decoder's layers, and every auxiliary head."""
    model, batch = family.detector(base, *heads), family.batch(sizes=[(64, 96), (50, 70)])
    losses, gradients, size = saved_bytes(model, batch)
    blocks = len(model.backbone.stages) + len(model.encoder.layers) + len(model.decoder.layers)
    assert enable_activation_checkpointing(model) == blocks + len(heads)
    again, of_again, smaller = saved_bytes(model, batch)
    assert smaller < 0.8 * size
    for name, loss in losses.items():
        assert torch.equal(again[name], loss), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_again[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_the_key_of_both_kinds_of_configs(kind):
    """The layers of encoder and decoder and both heads are switched."""
    key = {"lazy": "train.activation_checkpointing=true", "yaml": "TRAIN.ACTIVATION_CHECKPOINTING"}
    file = model_zoo.get_config_file("CoDETR/co_deformable_detr_tiny_shapes", kind)
    cfg = config.load(file, [key[kind]] if kind == "lazy" else [key[kind], "True"])
    assert experiment(cfg, device="cpu").settings.activation_checkpointing
    model = config.build_model(cfg)
    switched = [n for n, m in model.named_modules() if "forward" in vars(m) or "predict" in vars(m)]
    assert switched == []
    enable_activation_checkpointing(model)
    switched = [n for n, m in model.named_modules() if "forward" in vars(m) or "predict" in vars(m)]
    layers = {f"{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)}
    assert layers | {"auxiliary_heads.0", "auxiliary_heads.1"} <= set(switched)
