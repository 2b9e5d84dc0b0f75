"""Any of timm's convolutional or hierarchical models as a Detectron2 backbone.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import build_norm, set_norms

__all__ = ["TIMM_NORMS", "TimmBackbone"]

TIMM_NORMS = ("", "FrozenBN", "SyncBN")
# How timm calls the stages of ConvNeXt, Swin and ResNet; a ResNet's count from 1.
_STAGE = re.compile(r"(stages|layers|layer)[_.]?(\d+)\.(?:blocks\.)?(\d+|downsample)")
_BLOCKS_PER_LAYER = 3
_IMAGE = "res0"


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """Feature maps of a timm model, ``res2`` at stride 4 to ``res5`` at stride 32 (``res<k>`` has
    stride 2^k, less where the model dilates instead), each ``(N, C, Hi, Wi)``. ``res0`` is the
    image itself, for heads that need its size.

    Images may have any size; pad them to ``size_divisibility`` for maps that a pyramid can add up.

    Args:
        name: of the model in timm, such as ``convnext_tiny`` or ``swin_tiny_patch4_window7_224``
        out_indices: which of its feature maps, in timm's numbers: ConvNeXt and Swin have four from
            stride 4 on, ResNet five from stride 2 on; negative ones count from the last
        out_features: names of those that are returned, ``res0`` too where it is named; None: all
            of ``out_indices``
        drop_path_rate: of the last block; rises linearly from 0
        norm: what its batch norms become: ``FrozenBN`` or ``SyncBN``; empty: they stay
        norm_eps, norm_momentum: of its norms, the momentum of batch norms only; None: timm's
        same_padding: fill up with zeros before each convolution whose stride is its kernel size
            (ConvNeXt's stem and downsampling), so that sizes are rounded up and no pixel is lost
        size_divisibility: to what multiple batches are filled up, 0 for none; None: the largest
            stride
        out_norm: norm of each feature map, such as ``LN``, which ConvNeXt and Swin detectors have;
            empty: none. Levels of ``out_indices`` that are not returned have theirs too, frozen:
            official checkpoints hold it.
        pretrained: start from timm's weights of this name (downloaded)
        weights: start from this file instead, in timm's or the official names of the model, or of
            a timm model that was trained as an ImageClassifier
        options: further arguments of the model's constructor in timm, such as
            ``{"depths": [1, 1, 2, 1], "dims": [24, 48, 64, 96]}`` for a small ConvNeXt
    """

    __jit_unused_properties__ = ["num_layers"]  # noqa: RUF012 (TorchScript wants a list)

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_indices: Sequence[int] = (-4, -3, -2, -1),
        out_features: Sequence[str] | None = None,
        drop_path_rate: float = 0.0,
        norm: str = "",
        norm_eps: float | None = None,
        norm_momentum: float | None = None,
        same_padding: bool = False,
        size_divisibility: int | None = None,
        out_norm: str = "",
        pretrained: bool = False,
        weights: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        arguments = {
            key: tuple(value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
            for key, value in (options or {}).items()
        }  # timm takes no lists of a config
        if drop_path_rate:
            arguments["drop_path_rate"] = drop_path_rate
        self.model = _build(name, out_indices, arguments, pretrained, weights)
        _change_norms(self, norm)
        set_norms(self.model, eps=norm_eps, momentum=norm_momentum)
        if same_padding:
            _pad_like_tensorflow(self.model)
        strides = self.model.feature_info.reduction()
        channels = self.model.feature_info.channels()
        names = _names(strides)
        shapes = {n: ShapeSpec(channels=c, stride=s) for n, c, s in zip(names, channels, strides)}
        shapes[_IMAGE] = ShapeSpec(channels=3, stride=1)
        wanted = names if out_features is None else list(out_features)
        for each in wanted:
            if each not in shapes:
                raise UserError(
                    f"{name} has no feature map {each!r}; expected some of {', '.join(names)} "
                    "(out_features and out_indices / MODEL.TIMM)"
                )
        self._names = names
        self._out_features = [each for each in [_IMAGE, *names] if each in wanted]
        self._size_divisibility = max(strides) if size_divisibility is None else size_divisibility
        self._shapes = shapes
        self._channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        self.norms = nn.ModuleDict()
        if out_norm:
            self.norms.update({n: build_norm(out_norm, c) for n, c in zip(names, channels)})
        for unused in set(self.norms) - set(wanted):
            self.norms[unused].requires_grad_(False)
        self._stages = _stage_blocks(self.model)

    @classmethod
    def from_config(cls, cfg, input_shape):
        node = cfg.MODEL.TIMM
        return {
            "name": node.NAME,
            "out_indices": node.OUT_INDICES,
            "out_features": list(node.OUT_FEATURES) or None,
            "drop_path_rate": node.DROP_PATH,
            "norm": node.NORM,
            "norm_eps": node.NORM_EPS,
            "norm_momentum": node.NORM_MOMENTUM,
            "same_padding": node.SAME_PADDING,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "out_norm": node.OUT_NORM,
            "pretrained": node.PRETRAINED,
            "weights": node.WEIGHTS,
            "options": {key.lower(): value for key, value in node.OPTIONS.items()},
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of normalised images ``(N, 3, H, W)``."""
        maps: dict[str, Tensor] = {}
        if "res0" in self._out_features:
            maps["res0"] = x
        for name, feature in zip(self._names, self.model(x)):
            if name not in self._out_features:
                continue
            if self._channels_last:
                feature = feature.permute(0, 3, 1, 2)
            for level, norm in self.norms.items():  # TorchScript has no lookup by variable
                if level == name:
                    feature = norm(feature)
            maps[name] = feature
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: self._shapes[name] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward, in timm's own way.

        Raises:
            AssertionError: the model cannot.
        """
        self.model.set_grad_checkpointing(enable)

    # ------------------------------------------------ layer-wise learning rates

    @property
    def num_layers(self) -> int:
        """Layers of ConvNeXt's rule for layer-wise decay: one for each of stages 1 and 2, one for
        every three blocks of stage 3, and one for stage 4; the stem is layer 0. Models of other
        than four stages have no such layers: 0, and :meth:`layer_id` says why.
        """
        if len(self._stages) != 4:
            return 0  # tracing reads every property of a model
        return 3 + math.ceil(self._numbered_stages()[2] / _BLOCKS_PER_LAYER)

    def layer_id(self, name: str) -> int | None:
        """Return the layer of the parameter ``name``; None for those without decay, the norms of
        the feature maps.
        """
        stages = self._numbered_stages()
        if not name.startswith("model."):
            return None
        found = _STAGE.match(name.removeprefix("model."))
        if found is None:
            return 0
        stage = int(found[2]) - (found[1] == "layer")
        if stage == len(stages) - 1:
            return self.num_layers
        if stage < 2:
            return stage + 1
        block = 0 if found[3] == "downsample" else int(found[3])
        return 3 + block // _BLOCKS_PER_LAYER

    def _numbered_stages(self) -> list[int]:
        if len(self._stages) != 4:
            raise UserError(
                f"layer-wise decay is defined for timm models of four stages; this one has "
                f"{len(self._stages)} that it knows (SOLVER.LAYER_DECAY 1.0 / layer_decay=1.0)"
            )
        return self._stages


def _build(
    name: str,
    out_indices: Sequence[int],
    options: Mapping[str, Any],
    pretrained: bool,
    weights: str,
) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(
            f"timm has no model {name!r} (MODEL.TIMM.NAME / name of TimmBackbone)"
            f"{nearest(name, timm.list_models())}"
        )
    arguments = {**options, "features_only": True, "out_indices": tuple(out_indices)}
    if name.startswith("swin"):
        arguments["strict_img_size"] = False  # windows are padded
    state = None
    if weights:
        state = _read_weights(weights)
        arguments["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
    try:
        model = timm.create_model(name, pretrained=pretrained or bool(weights), **arguments)
    except (TypeError, AssertionError, IndexError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build the feature maps {list(out_indices)} of {name}: {error}"
        ) from error
    if hasattr(getattr(model, "patch_embed", None), "dynamic_img_pad"):
        model.patch_embed.dynamic_img_pad = True  # sizes that are no multiple of the patch
    if state is not None:
        _check_used(model, state, weights)
    return model


def _read_weights(path: str) -> Mapping[str, Tensor]:
    from d2dense import checkpoint  # it reads no code, unlike timm's own function

    content = checkpoint.read(path)
    for root in ("model_ema", "state_dict", "model"):
        if isinstance(content.get(root), Mapping):
            content = content[root]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(key.startswith("network.") for key in tensors):
        # a checkpoint of our ImageClassifier on a timm model
        return {key.removeprefix("network."): value for key, value in tensors.items()}
    return tensors


def _check_used(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Raise a ``UserError`` for parameters that were not in the file; timm drops names silently."""
    by_size = defaultdict(list)
    for value in state.values():
        by_size[value.numel()].append(value.flatten())
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not any(torch.equal(parameter.flatten(), each) for each in by_size[parameter.numel()])
    ]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(list(model.parameters()))} parameters of the "
            f"timm model, {missing[0]} first; give weights of the same model (MODEL.TIMM.WEIGHTS / "
            "weights of TimmBackbone)"
        )


def _change_norms(backbone: TimmBackbone, norm: str) -> None:
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm not in TIMM_NORMS:
        raise UserError(
            f"norm of TimmBackbone (MODEL.TIMM.NORM) is {norm!r}; expected one of FrozenBN, SyncBN "
            "or an empty text"
        )
    if norm == "FrozenBN":
        backbone.model = freeze_batch_norm_2d(backbone.model)
    elif norm == "SyncBN":
        backbone.model = convert_sync_batchnorm(backbone.model)


def _names(strides: Sequence[int]) -> list[str]:
    """Return ``res<log2 of the stride>``, counted on where dilated stages keep the stride."""
    levels: list[int] = []
    for stride in strides:
        levels.append(max(round(math.log2(stride)), levels[-1] + 1 if levels else 0))
    return [f"res{level}" for level in levels]


def _pad_like_tensorflow(model: nn.Module) -> None:
    """Let convolutions whose patches do not overlap see the rest at the border too, in place."""
    from timm.layers import Conv2dSame

    for module in model.modules():
        if type(module) is nn.Conv2d and module.stride == module.kernel_size != (1, 1):
            # both keep their state in the attributes of nn.Conv2d; without padding they are equal
            module.__class__ = Conv2dSame


def _stage_blocks(model: nn.Module) -> list[int]:
    """Return how many blocks each stage has, from the names of the parameters."""
    blocks = defaultdict(set)
    for name, _ in model.named_parameters():
        found = _STAGE.match(name)
        if found is not None and found[3] != "downsample":
            blocks[int(found[2])].add(found[3])
    return [len(blocks[stage]) for stage in sorted(blocks)]
