"""Parameter names of the official code for our modules.

Modules are walked together with a table, per class, of what the official code calls their parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from detectron2.layers import Conv2d
from torch import Tensor, nn

from d2dense.checkpoint import Correspondence
from d2dense.modeling.upernet import PyramidPooling, UperNetHead

from .backbone import CEDNet, FinestLevel, Pyramid
from .blocks import (
    AttentionBlock,
    BottleneckBlock,
    ConvNormAct,
    DepthwiseConvNormAct,
    LRBottleneckBlock,
    LRNextBlock,
    LRWindowBlock,
    NextBlock,
)
from .classifier import CEDNetClassifier
from .cross_shaped import CrossShapedAttention, GlobalAttention
from .official_heads import CLASS_KEYS, HEADS, Layout, layouts
from .stages import Decoder, Encoder, Stage
from .trunk import CEDNetTrunk
from .window import WindowAttention

__all__ = ["correspondence", "part_names"]

_MLP = {"mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
_BOTTLENECK = {"near": "conv1", "expand": "conv2", "reduce": "conv3"}

# class -> part of ours -> theirs; "" is the parent itself. Other modules have equal names.
_PARTS: dict[type, dict[str, str]] = {
    ConvNormAct: {"conv": "0", "norm": "1"},
    DepthwiseConvNormAct: {"conv": "0", "norm": "1"},
    NextBlock: {"conv": "dwconv", "norm": "norm", **_MLP, "residual.gamma": "gamma"},
    LRNextBlock: {"near": "dwconv1", "far": "dwconv2", **_MLP, "residual.gamma": "gamma"},
    BottleneckBlock: _BOTTLENECK,
    LRBottleneckBlock: {**_BOTTLENECK, "far": "dwconv1"},
    AttentionBlock: {"norm1": "norm1", "mixer": "", "norm2": "norm2", **_MLP},
    LRWindowBlock: {
        "norm1": "norm1",
        "mixer": "",
        "mixer_norm": "norm_act1.0",
        "far.conv": "dwconv2",
        "far.norm": "norm_act2.0",
        "norm2": "norm2",
        **_MLP,
    },
    WindowAttention: {
        "position_bias": "attn.relative_position_bias_table",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
    },
    CrossShapedAttention: {
        "qkv": "qkv",
        "proj": "proj",
        "vertical.position": "attns.0.get_v",
        "horizontal.position": "attns.1.get_v",
    },
    GlobalAttention: {"qkv": "qkv", "proj": "proj", "everywhere.position": "attns.0.get_v"},
    Stage: {"encoder": "0", "decoder": "1"},
    Encoder: {"levels": "encoder", "down": "encoder_downsample"},
    Decoder: {
        "up.0": "decoder_upsample.0.0",
        "up.1": "decoder_upsample.1.0",
        "norm": "decoder_norm",
        "before": "lateral",
        "after": "decoder",
        "smooth": "decoder_conv",
    },
    Pyramid: {"lateral": "reduce_convs", "extra": "add_blocks", "finest": ""},
    FinestLevel: {"lateral": "reduce_c2", "norm": "merge_c2.0", "conv": "merge_c2.1"},
    CEDNet: {"trunk": "", "pyramid": ""},
    Conv2d: {"weight": "conv.weight", "bias": "conv.bias", "norm": "bn"},
    PyramidPooling: {
        **{f"pools.{i}": f"psp_modules.{i}" for i in range(8)},
        "fuse": "bottleneck",
    },
}


def correspondence(model: nn.Module, names: Collection[str]) -> Correspondence:
    """Return which official names belong to the tensors of ``model`` (the source ``cednet``).

    Args:
        model: contains a CEDNet: a backbone, a classifier or a whole detector.
        names: those of the official file, which tell what kind of model it holds; empty for
            the names of ``model`` as they are.
    """
    prefix = "backbone." if any(name.startswith("backbone.") for name in names) else ""
    if not names and any(path == "backbone" for path, _ in model.named_modules()):
        prefix = "backbone."
    pairs: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    orders: dict[str, Layout] = {}
    trunk_path = ""
    for path, module in model.named_modules():
        ours = f"{path}." if path else ""
        orders |= {ours + name: order for name, order in layouts(module).items()}
        if isinstance(module, CEDNetTrunk):
            trunk_path = ours
        for our_name, their_name, constant in _top(module, prefix):
            if constant is None:
                pairs[ours + our_name] = their_name
            else:
                constants[their_name] = constant
    unused, fresh = _expected(model, set(names), trunk_path, prefix)
    return Correspondence(
        names=pairs,
        constants=constants,
        unused=unused,
        fresh=fresh,
        layouts=orders,
        class_keys=CLASS_KEYS,
    )


def part_names(part: nn.Module) -> dict[str, str]:
    """Return our name -> official name of every tensor of one part: a block, an encoder, a decoder.

    Raises:
        ValueError: a part without a counterpart in the official code.
    """
    if type(part) not in _PARTS:
        raise ValueError(f"the official code has no counterpart of {type(part).__name__}")
    return {ours: theirs for ours, theirs, constant in _walk(part, "", "") if constant is None}


def _top(module: nn.Module, prefix: str) -> Iterator[tuple[str, str, Tensor | None]]:
    """Yield the names of a part that stands on its own in the official code."""
    if isinstance(module, CEDNetTrunk):
        yield from _walk(module, "", prefix, _trunk_parts(module))
    elif isinstance(module, Pyramid):
        yield from _walk(module, "", prefix)
    elif isinstance(module, CEDNetClassifier):
        yield from _walk(module, "", prefix, _classifier_parts(module))
    elif isinstance(module, UperNetHead):
        yield from _walk(module, "", "", _upernet_parts(module))
    else:
        for kind, parts in HEADS.items():
            if isinstance(module, kind):
                yield from _walk(module, "", "", parts(module))


def _trunk_parts(trunk: CEDNetTrunk) -> dict[str, str]:
    first = {f"first.{i}": f"stages.0.{i}" for i in range(len(trunk.first))}
    stages = {f"stages.{k}": f"stages.{k + 1}" for k in range(len(trunk.stages))}
    stem = {
        "stem.0.conv": "stem.0",
        "stem.0.norm": "stem.1",
        "stem.1.conv": "stem.3",
        "stem.1.norm": "stem.4",
    }
    return {**stem, **first, "down": f"stages.0.{len(trunk.first)}", **stages}


def _classifier_parts(model: CEDNetClassifier) -> dict[str, str]:
    parts = {}
    for i in range(len(model.heads)):
        parts[f"heads.{i}.conv"] = f"final_layers.{i}"
        parts[f"heads.{i}.norm"] = f"norms.{i}"
        parts[f"heads.{i}.linear"] = f"heads.{i}"
    return parts


def _upernet_parts(head: UperNetHead) -> dict[str, str]:
    parts = {
        "pooling": "decode_head",
        "lateral": "decode_head.lateral_convs",
        "output": "decode_head.fpn_convs",
        "fuse": "decode_head.fpn_bottleneck",
        "classifier": "decode_head.conv_seg",
    }
    if head.auxiliary is not None:
        parts["auxiliary.0"] = "auxiliary_head.convs.0"
        parts["auxiliary.2"] = "auxiliary_head.conv_seg"
    return parts


def _walk(
    module: nn.Module, ours: str, theirs: str, parts: dict[str, str] | None = None
) -> Iterator[tuple[str, str, Tensor | None]]:
    """Yield (our name, their name, None) of every tensor, or ("", their name, constant).

    ``ours`` and ``theirs`` end with a dot unless they are empty.
    """
    if parts is None:
        parts = _PARTS.get(type(module))
    if isinstance(module, WindowAttention):
        yield "", f"{theirs}attn.relative_position_index", module.position_index
    if parts is None:
        parts = {name: name for name, _ in module.named_children()}
        own = [name for name, _ in module.named_parameters(recurse=False)]
        own += [name for name, _ in module.named_buffers(recurse=False)]
        for name in own:
            yield ours + name, theirs + name, None
    for name, other in parts.items():
        part = _part(module, name)
        if isinstance(part, nn.Module):
            yield from _walk(part, f"{ours}{name}.", f"{theirs}{other}." if other else theirs)
        elif part is not None:
            yield ours + name, theirs + other, None


def _part(module: nn.Module, path: str) -> nn.Module | Tensor | None:
    """Return what ``path`` leads to; None where there is nothing."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _expected(model: nn.Module, names: set[str], trunk_path: str, prefix: str) -> tuple[str, str]:
    """Return the patterns of their names without use and of our names without weights that are no
    mistake.
    """
    nothing = "$^"
    if any(name.startswith("final_layers.") for name in names):
        if isinstance(model, CEDNetClassifier):
            return nothing, nothing
        # pre-training: its classifiers are left behind; the detector around the trunk, and a last
        # decoder, which a classifier does not have, start afresh
        trunk = trunk_path.replace(".", r"\.")
        last = rf"{trunk}stages\.{_last_stage(names) - 1}\.decoder\."
        return r"(final_layers|norms|heads)\.", rf"(?!{trunk}(stem|first|down|stages)\.)|{last}"
    if prefix and isinstance(model, CEDNet):
        return r"(?!backbone\.)", nothing  # a whole detector's file, of which this is a part
    return nothing, nothing


def _last_stage(names: set[str]) -> int:
    return max(int(name.split(".")[1]) for name in names if name.startswith("stages."))
