"""Smaller versions of lazy configs that keep every kind of module: fewer blocks and layers, and
narrower backbones, by the configs' own parameters.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from d2dense.modeling import DeformableDETR

__all__ = ["reduced", "structure"]

_WIDTHS = {"res2": 32, "res3": 64, "res4": 128, "res5": 256}
_CEDNET_WIDTHS = [32, 64, 96, 128]
_QUERIES = 30
_SQUARE = 128

# What only training reads, and numbers of classes; models that differ in these alone are exported
# alike.
_IMMATERIAL = (
    "anchor_matcher",
    "auxiliary_weight",
    "batch_size_per_image",
    "box_reg_loss_type",
    "car_losses",
    "criterion",
    "drop_path",
    "drop_path_rate",
    "dropout",
    "head_weights",
    "layer_count",
    "layer_rule",
    "label_smoothing",
    "mixup",
    "cutmix",
    "norm_momentum",
    "num_classes",
    "official_drop_path",
    "positive_fraction",
    "pretrained",
    "proposal_matcher",
    "proposal_matchers",
    "weights",
)


def reduced(cfg: DictConfig) -> DictConfig:
    """Return a config whose model is smaller; the given one stays as it is."""
    cfg = copy.deepcopy(cfg)  # all of it: a model may refer to its data
    for node in list(_nodes(cfg.model)):
        change = _CHANGES.get(_name(node))
        if change is not None:
            change(node)
    if any(_name(node) in _NARROWED and _is_narrow(node) for node in _nodes(cfg.model)):
        _follow_widths(cfg.model)
    return cfg


def structure(cfg: DictConfig) -> str:
    """Return a short name of what is exported of a config's model: equal for models that differ in
    what only training reads.
    """
    text = json.dumps(_plain(cfg.model), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _plain(value: Any) -> Any:
    if isinstance(value, (DictConfig, dict)):
        entries = ((str(k), v) for k, v in value.items())
        return {
            k: _plain(v)
            for k, v in entries
            if k not in _IMMATERIAL and v is not None and not k.startswith(("loss_", "smooth_l1"))
        }
    if isinstance(value, (ListConfig, list, tuple)):
        return [_plain(each) for each in value]
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _nodes(value: Any) -> Iterator[DictConfig]:
    """Yield every mapping below ``value``, outermost first."""
    if isinstance(value, DictConfig):
        yield value
        for each in list(value.values()):
            yield from _nodes(each)
    elif isinstance(value, (ListConfig, list, tuple)):
        for each in value:
            yield from _nodes(each)


def _name(node: DictConfig) -> str:
    target = node.get("_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", "")


def _layers(count: int) -> Callable[[DictConfig], None]:
    def change(node: DictConfig) -> None:
        node.layers = count

    return change


def _set(name: str, value: Any) -> Callable[[DictConfig], None]:
    def change(node: DictConfig) -> None:
        node[name] = value

    return change


def _swin(node: DictConfig) -> None:
    node.depths, node.embed_dim = [2, 2, 2, 2], _WIDTHS["res2"]
    node.heads, node.window = [1, 2, 4, 8], 4


def _vit(node: DictConfig) -> None:
    node.depth, node.global_blocks = 2, [1]


def _timm(node: DictConfig) -> None:
    options = dict(node.get("options") or {})
    if node.name.startswith(("convnext_", "convnextv2_")):
        node.name = f"{node.name.partition('_')[0]}_tiny"
        options |= {"depths": (1, 1, 1, 1), "dims": tuple(_WIDTHS.values())}
    elif node.name.startswith("swin_"):
        node.name = "swin_tiny_patch4_window7_224"
        options |= {"depths": (2, 2, 2, 2), "embed_dim": _WIDTHS["res2"]}
        options["num_heads"] = (1, 2, 4, 8)
    elif node.name.startswith("resnet50"):
        options["layers"] = (1, 1, 1, 1)
    if options:
        node.options = options


def _default_stages(node: DictConfig) -> None:
    node.depth = 50


def _late_stride(node: DictConfig) -> None:
    grid = len(node.get("multi_grid") or (1, 2, 4))
    node.options = {**(node.get("options") or {}), "layers": [2, 2, 2, grid]}


def _cednet(node: DictConfig) -> None:
    """Reduce the trunk below a backbone or classifier."""
    trunk, names = node.trunk, node.get("out_features") or []
    family = trunk.get("family")
    # window attention alternates between two kinds of blocks
    most = 2 if family is not None and _name(family) in ("SwinFamily", "CSwinFamily") else 1
    blocks = list(trunk.get("blocks") or (2, 4, 2))
    own = isinstance(blocks[0], (ListConfig, list, tuple))
    trunk.first_blocks = 1
    trunk.blocks = (
        [[min(b, most) for b in each] for each in blocks] if own else [most for _ in blocks]
    )
    if family is not None and _name(family) == "CSwinFamily":
        return  # its widths are as small as they can be
    # out_features such as "stage2_c3" and "c2" name stages, or levels whose width heads know
    if all(name.startswith("p") for name in names):
        trunk.widths = _CEDNET_WIDTHS
        if own:
            trunk.blocks = trunk.blocks[:2]
        else:
            trunk.num_stages = 2


def _detr(node: DictConfig) -> None:
    if node.get("square"):
        node.square = _SQUARE
    if node.get("denoising") is not None:
        node.denoising = None


# But for evaluate_branch, whose head is needed.
_ONLY_CODETR = (
    "adapter",
    "auxiliary_heads",
    "positive_queries",
    "query_weight",
    "head_weight",
    "train_heads",
    "one_pass",
)


def _codetr(node: DictConfig) -> None:
    """Leave the base detector, which is all that is exported."""
    _detr(node)
    if node.get("evaluate_branch") is not None:
        return
    for name in _ONLY_CODETR:
        node.pop(name, None)
    node._target_ = DeformableDETR


_CHANGES: dict[str, Callable[[DictConfig], None]] = {
    "make_default_stages": _default_stages,
    "AnchorQueries": _set("num_queries", _QUERIES),
    "BiFPN": _set("num_layers", 1),
    "CEDNet": _cednet,
    "CEDNetClassifier": _cednet,
    "CoDETR": _codetr,
    "ConditionalDecoder": _layers(2),
    "DeformableDETR": _detr,
    "DeformableDecoder": _layers(2),
    "DeformableEncoder": _layers(2),
    "EVA02ViT": _vit,
    "LateStrideResNet": _late_stride,
    "LearnedQueries": _set("num_queries", _QUERIES),
    "MaskDecoder": _layers(3),
    "NASFPN": _set("num_stages", 1),
    "PixelDecoder": _layers(1),
    "PointQueries": _set("num_queries", _QUERIES),
    "PredictionHeads": _layers(2),
    "SingleScaleEncoder": _layers(2),
    "Swin": _swin,
    "TimmBackbone": _timm,
    "TwoStageQueries": _set("num_queries", _QUERIES),
    "timm_classifier": _timm,
}

_NARROWED = ("Swin", "TimmBackbone")


def _is_narrow(node: DictConfig) -> bool:
    return _name(node) == "Swin" or node.name.startswith(("convnext", "swin_"))


def _follow_widths(model: DictConfig) -> None:
    """Let what takes ``res2`` to ``res5`` take the narrower ones."""
    for node in _nodes(model):
        for level, width in _WIDTHS.items():
            shape = node.get(level) if level in node else None
            if isinstance(shape, DictConfig) and "channels" in shape:
                shape.channels = width
        if _name(node) == "LastLevelP6P7" and node.get("in_feature", "res5") == "res5":
            node.in_channels = _WIDTHS["res5"]
