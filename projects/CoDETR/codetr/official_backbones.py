"""Names that the official code gives to the tensors of backbones and necks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.modeling.backbone import ResNet
from torch import Tensor, nn

from d2dense.modeling import EVA02ViT, Swin
from d2dense.modeling.detr import ChannelMapper
from d2dense.modeling.necks import SimplePyramid
from d2dense.modeling.pretraining import eva02_name
from d2dense.modeling.vit import rotary_table

__all__ = ["constants", "names"]


def names(module: nn.Module) -> dict[str, str]:
    """Return our name -> official name of every tensor in ``module.state_dict()``, the official
    ones without ``backbone.`` or ``neck.`` in front.

    Raises:
        ValueError: a backbone or neck that the official code does not have.
    """
    return {name: _renamer(module)(name) for name in module.state_dict()}


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Return official name -> value of the tensors that only the official code saves, because ours
    computes them or has no use for them; without ``backbone.`` or ``neck.`` in front.
    """
    if isinstance(module, ResNet):
        return _batch_counts(module)
    if isinstance(module, EVA02ViT):
        return _rotary_tables(module)
    if isinstance(module, Swin):
        return {k: v for k, v in module.named_buffers() if k.endswith("relative_position_index")}
    return {}


def _renamer(module: nn.Module) -> Callable[[str], str]:
    for kind, rename in _RENAME.items():
        if isinstance(module, kind):
            return rename
    raise ValueError(f"the official code has no counterpart of {type(module).__name__}")


# ------------------------------------------------ ResNet, under torchvision's names

_RESNET = {
    "stem.": "",
    **{f"res{k}.": f"layer{k - 1}." for k in range(2, 6)},
    **{f"conv{k}.norm.": f"bn{k}." for k in range(1, 4)},
    "shortcut.norm.": "downsample.1.",
    "shortcut.": "downsample.0.",
}


def _resnet(name: str) -> str:
    for ours, theirs in _RESNET.items():
        name = name.replace(ours, theirs)
    return name


def _batch_counts(module: ResNet) -> dict[str, Tensor]:
    """Return the counts of seen batches that frozen norms do not have."""
    own = module.state_dict().keys()
    counts = (
        name.removesuffix("running_var") + "num_batches_tracked"
        for name in own
        if name.endswith("running_var")
    )
    return {_resnet(name): torch.tensor(0) for name in counts if name not in own}


# ------------------------------------------------ EVA-02


def _vit(name: str) -> str:
    return f"out_{name}" if name.startswith("norm.") else eva02_name(name)


def _rotary_tables(module: EVA02ViT) -> dict[str, Tensor]:
    """Return the sines and cosines of windows, and of whole maps where these have a fixed size, as
    each block saves them.
    """
    like = torch.empty(0, device="cpu")
    tables = {}
    for prefix, window in (("rope_win", module.window), ("rope_glb", None)):
        side = window or module.rotary_side
        if side is None:
            continue
        sines, cosines = rotary_table(side, side, module.head_channels, like, side=side).chunk(2, 1)
        blocks = (i for i, block in enumerate(module.blocks) if block.attn.window == window)
        for owner in (prefix, *(f"blocks.{i}.attn.rope" for i in blocks)):
            tables |= {f"{owner}.freqs_cos": cosines, f"{owner}.freqs_sin": sines}
    return tables


# ------------------------------------------------ necks


def _simple_pyramid(name: str) -> str:
    return name.removeprefix("levels.")


def _channel_mapper(name: str) -> str:
    if ".norm." in name:
        return name.replace(".norm.", ".gn.")
    return name.replace(".weight", ".conv.weight")


def _same(name: str) -> str:
    return name


_RENAME: dict[type, Callable[[str], str]] = {
    ResNet: _resnet,
    Swin: _same,
    EVA02ViT: _vit,
    ChannelMapper: _channel_mapper,
    SimplePyramid: _simple_pyramid,
}
