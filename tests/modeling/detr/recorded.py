"""The recorded Co-Deformable DETR: weights by rule under official names, and our modules filled."""

from __future__ import annotations

import functools
import gzip
import json
import math
import zlib

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter

from d2dense.modeling.detr import (
    ChannelMapper,
    DeformableDecoder,
    DeformableDETR,
    DeformableEncoder,
    DETRCriterion,
    HungarianMatcher,
    TwoStageQueries,
)
from d2dense.modeling.detr.heads import PredictionHeads
from tests.projects.cednet.golden import REFERENCE

FOLDER = REFERENCE / "golden" / "codetr"
THERE = (FOLDER / "units.npz").is_file()
UNITS = FOLDER / "units.npz"
VARIANT = "co_deformable_detr_r50_1x"

# ours -> theirs, of a layer
_ATTENTION = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_ENCODER = {
    **{f"attention.{part}": f"attentions.0.{part}" for part in _ATTENTION},
    "norm1": "norms.0",
    "ffn.linear1": "ffns.0.layers.0.0",
    "ffn.linear2": "ffns.0.layers.1",
    "norm2": "norms.1",
}
_DECODER = {
    "self_attention": "attentions.0.attn",
    **{f"cross_attention.{part}": f"attentions.1.{part}" for part in _ATTENTION},
    "norm1": "norms.0",
    "norm2": "norms.1",
    "ffn.linear1": "ffns.0.layers.0.0",
    "ffn.linear2": "ffns.0.layers.1",
    "norm3": "norms.2",
}


@functools.cache
def shapes() -> dict[str, list[int]]:
    path = REFERENCE / "codetr_state_dicts.json.gz"
    with gzip.open(path, "rt") as file:
        return {key: shape for key, shape, _ in json.load(file)[VARIANT]}


def weight(key: str, shape=None) -> torch.Tensor:
    """The value that the reference's rule gives the official parameter ``key``."""
    shape = shapes()[key] if shape is None else shape
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return 1 + 0.1 * torch.rand(shape, generator=g)
    if key.endswith("sampling_offsets.bias"):
        return _directions(shape[0])
    random = torch.randn(shape, generator=g)
    if len(shape) >= 2:
        if any(part in key for part in ("query_embed", "label_embed", "level_embed")):
            return random
        random = random / math.sqrt(math.prod(shape[1:]))
        if key.endswith(("out_proj.weight", "output_proj.weight", "ffns.0.layers.1.weight")):
            random = 0.3 * random
        if "reg_branches" in key and key.endswith(".4.weight"):
            random = 0.2 * random
        return random
    if key.endswith((".weight", ".scale")):
        return 1 + 0.02 * random
    return 0.02 * random


def _directions(size: int) -> torch.Tensor:
    result = torch.zeros(8, size // 64, 4, 2)
    for head in range(8):
        x, y = math.cos(2 * math.pi * head / 8), math.sin(2 * math.pi * head / 8)
        for point in range(4):
            result[head, :, point] = torch.tensor([x, y]) / max(abs(x), abs(y)) * (point + 1)
    return result.flatten()


def fill(module: nn.Module, names: dict[str, str], prefix: str) -> nn.Module:
    """Fill ``module`` by the first part of ``names`` that fits each of its parameters."""
    state = {}
    for name in module.state_dict():
        ours = max((part for part in names if name.startswith(part)), key=len)
        state[name] = weight(prefix + names[ours] + name[len(ours) :])
    module.load_state_dict(state)
    return module.eval()


def image() -> torch.Tensor:
    return torch.randn(1, 3, 192, 256, generator=torch.Generator().manual_seed(30))


def backbone() -> nn.Module:
    with torch.device("meta"):
        model = resnet50()
    layers = {"layer2": "res3", "layer3": "res4", "layer4": "res5"}
    body = IntermediateLayerGetter(model, layers).to_empty(device="cpu")
    state = {}
    for name, value in body.state_dict().items():
        state[name] = value if name.endswith("tracked") else weight(f"backbone.{name}")
    body.load_state_dict(state)
    return body.eval()


def neck() -> ChannelMapper:
    from detectron2.layers import ShapeSpec

    widths = {"res3": 512, "res4": 1024, "res5": 2048}
    names = {f"convs.{i}.weight": f"convs.{i}.conv.weight" for i in range(3)}
    names |= {f"convs.{i}.norm": f"convs.{i}.gn" for i in range(3)}
    names |= {"extra_convs.0.weight": "extra_convs.0.conv.weight"}
    names |= {"extra_convs.0.norm": "extra_convs.0.gn"}
    mapper = ChannelMapper(
        input_shape={name: ShapeSpec(channels=width) for name, width in widths.items()},
        in_features=list(widths),
    )
    return fill(mapper, names, "neck.")


def encoder() -> DeformableEncoder:
    names = {"level_embedding": "level_embeds"}
    for i in range(6):
        names |= {f"layers.{i}.{k}": f"encoder.layers.{i}.{v}" for k, v in _ENCODER.items()}
    return fill(DeformableEncoder(feedforward=2048), names, "query_head.transformer.")


def decoder() -> DeformableDecoder:
    names = {}
    for i in range(6):
        names |= {f"layers.{i}.{k}": f"decoder.layers.{i}.{v}" for k, v in _DECODER.items()}
    module = DeformableDecoder(feedforward=2048, box_refinement=True, look_forward_twice=True)
    return fill(module, names, "query_head.transformer.")


def heads() -> PredictionHeads:
    names = {f"classes.{i}.": f"cls_branches.{i}." for i in range(6)}
    names |= {f"boxes.{i}.layers.": f"reg_branches.{i}." for i in range(6)}
    return fill(PredictionHeads(layers=6, shared=False), names, "query_head.")


# ours -> theirs, of the two stages
QUERIES = {
    "transform": "transformer.enc_output",
    "norm": "transformer.enc_output_norm",
    "classes": "cls_branches.6",
    "boxes.layers": "reg_branches.6",
    "content": "query_embedding",
    "positions.linear": "transformer.pos_trans",
    "positions.norm": "transformer.pos_trans_norm",
}


def queries() -> TwoStageQueries:
    return fill(TwoStageQueries(), QUERIES, "query_head.")


def detector() -> DeformableDETR:
    """The whole model without its auxiliary heads."""
    return DeformableDETR(
        backbone=backbone(),
        in_features=["res3", "res4", "res5"],
        neck=neck(),
        encoder=encoder(),
        queries=queries(),
        decoder=decoder(),
        heads=heads(),
        criterion=DETRCriterion(matcher=HungarianMatcher()),
        num_classes=80,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    ).eval()


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())
