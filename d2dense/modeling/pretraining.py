"""From the classifiers that EVA-02 and Swin were pre-trained as to models with these backbones.

Initial weights of these kinds are recognised when they are loaded: the backbone takes what it has a
place for, the classifier is left behind, everything else starts afresh.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.checkpoint import Correspondence, register_source
from d2dense.errors import UserError

from .swin import Swin
from .vit import EVA02ViT

__all__ = ["eva02_name"]

_EVA02 = {
    "position_embedding": "pos_embed",
    "patch_embed.": "patch_embed.proj.",
    ".attn.attention.": ".attn.",
    "q_proj.bias": "q_bias",
    "v_proj.bias": "v_bias",
    ".mlp.fc1_g.": ".mlp.w1.",
    ".mlp.fc1_x.": ".mlp.w2.",
    ".mlp.norm.": ".mlp.ffn_ln.",
    ".mlp.fc2.": ".mlp.w3.",
}
# timm's own parts have its names
_TIMM = {key: value for key, value in _EVA02.items() if "mlp" not in key and "bias" not in key}


def eva02_name(name: str, *, timm: bool = False) -> str:
    """Return what EVA-02's authors, or timm, call the tensor ``name`` of an :class:`EVA02ViT`."""
    for ours, theirs in (_TIMM if timm else _EVA02).items():
        name = name.replace(ours, theirs)
    return name


def _eva02(model: nn.Module, names: Collection[str]) -> Correspondence:
    """The source ``eva02_classifier``, of the authors or timm; patches and positions are resized
    bicubically, and the last norm starts afresh.
    """
    path, backbone = _only(model, EVA02ViT)
    own = backbone.state_dict()
    timm = "blocks.0.mlp.fc1_g.weight" in names
    resized = {
        f"{path}patch_embed.weight": partial(_resized_patches, like=own["patch_embed.weight"]),
        f"{path}position_embedding": partial(_resized_positions, like=own["position_embedding"]),
    }
    return Correspondence(
        names={
            path + name: eva02_name(name, timm=timm) for name in own if not name.startswith("norm.")
        },
        unused=r"(cls_token|mask_token|(fc_|lm_)?(norm|head)\.|(blocks\.\d+\.attn\.)?rope)",
        fresh=rf"(?!{re.escape(path)})|{re.escape(path)}norm\.",
        layouts={name: (resize, _unchanged) for name, resize in resized.items()},
    )


def _is_eva02(model: nn.Module, names: Collection[str]) -> bool:
    wanted = {"cls_token", "pos_embed", "blocks.0.attn.q_proj.weight"}
    return wanted <= set(names) and len(_places(model, EVA02ViT)) == 1


def _swin(model: nn.Module, names: Collection[str]) -> Correspondence:
    """The source ``swin_classifier``, of Microsoft or timm; the norms of the maps start afresh."""
    path, backbone = _only(model, Swin)
    timm = any(name.startswith("head.fc.") for name in names)
    own = (name for name in backbone.state_dict() if not name.startswith("norm"))
    return Correspondence(
        names={path + name: _timm_swin_name(name) if timm else name for name in own},
        unused=r"(norm|head)\.|.*\.(attn_mask|relative_position_index)$",
        fresh=rf"(?!{re.escape(path)})|{re.escape(path)}norm\d",
    )


def _is_swin(model: nn.Module, names: Collection[str]) -> bool:
    tables = "layers.0.blocks.0.attn.relative_position_bias_table" in names
    heads = any(name.startswith("head.") for name in names)
    return tables and heads and len(_places(model, Swin)) == 1


def _timm_swin_name(name: str) -> str:
    """timm halves the map at the start of a stage, not at the end of the one before."""
    return re.sub(
        r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name
    )


def _places(model: nn.Module, kind: type) -> list[tuple[str, nn.Module]]:
    """Return every ``kind`` in ``model`` and where it is, with a dot at the end."""
    return [
        (f"{path}." if path else "", part)
        for path, part in model.named_modules()
        if isinstance(part, kind)
    ]


def _only(model: nn.Module, kind: type) -> tuple[str, nn.Module]:
    found = _places(model, kind)
    if len(found) != 1:
        raise UserError(
            f"these weights are for a model with one {kind.__name__}; {type(model).__name__} has "
            f"{len(found)}"
        )
    return found[0]


def _resized_patches(value: Tensor, like: Tensor) -> Tensor:
    return _resized(value, like.shape[-1])


def _resized_positions(value: Tensor, like: Tensor) -> Tensor:
    side, target = (round((each.shape[1] - 1) ** 0.5) for each in (value, like))
    grid = value[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = _resized(grid, target).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([value[:, :1], grid], dim=1)


def _resized(value: Tensor, side: int) -> Tensor:
    if value.shape[-1] == side:
        return value
    return F.interpolate(value.float(), size=(side, side), mode="bicubic").to(value.dtype)


def _unchanged(value: Tensor) -> Tensor:
    return value


register_source("eva02_classifier", _eva02, recognise=_is_eva02)
register_source("swin_classifier", _swin, recognise=_is_swin)
