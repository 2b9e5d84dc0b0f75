"""CEDNet among timm's models: ``timm.create_model("cednet_next_tiny")`` after ``import cednet``.

A model here has the classifier of the last stage alone, in training too, as timm's tools expect one
tensor of scores; training with a classifier per stage is
:class:`~d2dense.modeling.ImageClassifier`'s. Weights of such a training, and official ones, load
with ``pretrained=True, pretrained_cfg_overlay={"file": "model_final.pth"}``.

Letters: N images, K classes, H and W of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register
from torch import Tensor, nn

from d2dense.checkpoint import convert

from .classifier import CEDNetClassifier, classifier_of
from .official_models import TRUNKS
from .trunk import CEDNetTrunk, init_weights

__all__ = [
    "TimmCEDNet",
    "cednet_cswin_tiny",
    "cednet_next_base",
    "cednet_next_small",
    "cednet_next_tiny",
    "cednet_res50",
    "cednet_swin_tiny",
]


class TimmCEDNet(nn.Module):
    """A trunk without a last decoder and a classifier on its last C5, with timm's methods.

    Args:
        trunk: name of an official trunk, see :data:`~cednet.official_models.TRUNKS`.
        num_classes: K; 0 for none: the model returns what its last layer would see, (N, 2048).
        in_chans: channels of the image.
        drop_rate: dropout before the last layer.
        drop_path_rate: of the last block.
        global_pool: only ``avg``.
    """

    def __init__(
        self,
        *,
        trunk: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        family, options = TRUNKS[trunk]
        self.trunk = CEDNetTrunk(
            family=family(),
            last_decoder=False,
            drop_path=drop_path_rate,
            in_channels=in_chans,
            **options,
        )
        self.num_features = self.trunk.widths[-1]
        self.drop_rate = drop_rate
        self.head = classifier_of(self.trunk, num_classes=max(num_classes, 1))
        self.head_hidden_size = self.head.linear.in_features
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**k, "module": f"c{k + 2}"}
            for k, width in enumerate(self.trunk.widths)
        ]
        self.grad_checkpointing = False
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(N, K)`` of normalised images ``(N, 3, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's C5, ``(N, C5, ceil(H / 32), ceil(W / 32))``."""
        _, stages = self.trunk(x)
        return stages[-1][2]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return scores, or with ``pre_logits`` what the last layer would see."""
        x = self.head.embed(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head.linear(x)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return some of C2 and the last stage's C3, C4, C5, and before them, unless
        ``intermediates_only``, what :meth:`forward_features` does. ``norm`` and ``stop_early``
        change nothing: every map ends in its block, and C3 depends on all stages.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; CEDNet has NCHW only")
        taken = _taken(len(self.feature_info), indices)
        height, width = x.shape[-2:]
        c2, stages = self.trunk(x)
        maps = (c2, *stages[-1])
        strides = [info["reduction"] for info in self.feature_info]
        found = [
            maps[k][:, :, : -(-height // strides[k]), : -(-width // strides[k])] for k in taken
        ]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier, of which :meth:`forward_intermediates` has no need."""
        taken = _taken(len(self.feature_info), indices)
        if prune_head:
            self.head = nn.Identity()
            self.num_classes = 0
        return taken

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.linear

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new last layer for ``num_classes``, or none for 0."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; CEDNet's classifier has avg only")
        self.num_classes = num_classes
        linear: nn.Module = nn.Identity()
        if num_classes > 0:
            linear = nn.Linear(self.head_hidden_size, num_classes)
            init_weights(linear)
        self.head.linear = linear

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of blocks in backward."""
        self.trunk.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters are a layer: the stem, the blocks at stride 4, every stage."""
        return {
            "stem": r"^trunk\.stem",
            "blocks": [(r"^trunk\.(?:first|down)\.", (-1,)), (r"^trunk\.stages\.(\d+)", None)],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()


def _taken(count: int, indices: int | list[int] | None) -> list[int]:
    """Return which of ``count`` maps timm's ``indices`` mean: None all, a number the last ones."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        indices = list(range(count - last, count))
    taken = [count + k if k < 0 else k for k in indices]
    if not taken or min(taken) < 0 or max(taken) >= count:
        raise IndexError(f"feature maps {list(indices)} of {count}")
    return taken


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: TimmCEDNet) -> dict[str, Tensor]:
    """Return the weights under this model's names: its own ones, those of a
    :class:`CEDNetClassifier`, also within an ``ImageClassifier``, or official ones.
    """
    weights = {name.removeprefix("network."): value for name, value in state_dict.items()}
    if any(name.startswith("final_layers.") for name in weights):
        last = max(name for name in weights if name.startswith("heads."))
        reader = CEDNetClassifier(trunk=model.trunk, num_classes=len(weights[last]))
        weights = convert(weights, "cednet", reader)
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    if not heads:
        return weights
    last = f"heads.{max(map(int, heads))}."
    kept = {name: value for name, value in weights.items() if not name.startswith("heads.")}
    for name, value in weights.items():
        if name.startswith(last):
            kept["head." + name.removeprefix(last)] = value
    return kept


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "trunk.stem.0.conv",
    "classifier": "head.linear",
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in __all__[1:]})


def _build(variant: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        TimmCEDNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        trunk=variant.removeprefix("cednet_"),
        **options,
    )


@register
def cednet_next_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet-NeXt-T."""
    return _build("cednet_next_tiny", pretrained, kwargs)


@register
def cednet_next_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet-NeXt-S."""
    return _build("cednet_next_small", pretrained, kwargs)


@register
def cednet_next_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet-NeXt-B."""
    return _build("cednet_next_base", pretrained, kwargs)


@register
def cednet_swin_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet-Swin-T."""
    return _build("cednet_swin_tiny", pretrained, kwargs)


@register
def cednet_cswin_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet-CSwin-T, of which there is no official classifier."""
    return _build("cednet_cswin_tiny", pretrained, kwargs)


@register
def cednet_res50(pretrained: bool = False, **kwargs) -> nn.Module:
    """Return CEDNet with ResNet's blocks."""
    return _build("cednet_res50", pretrained, kwargs)
