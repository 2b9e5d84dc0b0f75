"""Optimizer parameter groups and gradient clipping."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from d2dense.errors import UserError, nearest

from .sharded import local_part

__all__ = ["CLIP_TYPES", "GradientClipper", "is_norm", "param_groups"]

_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# Norm layers of detectron2, timm and of this library that derive from nn.Module only.
_NORM_NAME = re.compile(r"Norm(\d+d)?$")


def is_norm(module: nn.Module) -> bool:
    """Tell whether ``module`` normalises, by its type or else by the end of its class name."""
    return isinstance(module, _NORM_TYPES) or bool(_NORM_NAME.search(type(module).__name__))


def param_groups(
    model: nn.Module | None = None,
    *,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    weight_decay_1d: float | None = None,
    weight_decay_heads: float | None = None,
    no_decay_names: Sequence[str] = (),
    bias_lr_factor: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the trainable parameters as few optimizer groups, one per distinct (lr, weight decay).

    Few groups matter: multi-tensor and fused optimizers launch their kernels once per group.

    Args:
        model: set by the trainer; a lazy config leaves it out.
        base_lr: learning rate that the factors below scale; None leaves the optimizer's own.
        weight_decay: for everything without a rule of its own; None leaves the optimizer's own.
        weight_decay_norm: for weights and biases of normalisation layers; None means no rule.
        weight_decay_bias: for parameters named ``bias``, also those of norms; None means no rule.
        weight_decay_1d: for parameters of at most one dimension that neither of these two rules is
            for, such as layer scales; None means no rule.
        weight_decay_heads: for everything outside ``model.backbone`` (or its ``bottom_up``, where
            it is a pyramid around one), norms and biases included, whatever the rules above say;
            None means no rule.
        no_decay_names: parts of parameter names (such as ``pos_embed``) that get no weight decay.
        bias_lr_factor: factor on the learning rate of parameters named ``bias``.
        lr_multipliers: part of a parameter name -> factor on its learning rate; the first match
            counts.
        layer_decay: factor per layer counted from the end of each submodule that has ``num_layers``
            and ``layer_id(parameter_name) -> int | None`` (0 is the stem, None means no decay):
            ``layer_decay ** (num_layers + 1 - layer_id)``, but never above 1.

    Raises:
        UserError: a multiplier that matches nothing, layer decay on a model without layers, or a
            weight decay of heads for a model without a backbone.
    """
    if model is None:
        raise ValueError("param_groups needs the model")
    lr_multipliers = dict(lr_multipliers or {})
    factors = layer_decay != 1.0 or bias_lr_factor != 1.0 or lr_multipliers
    if factors and base_lr is None:
        raise UserError(
            "learning-rate factors need a rate to scale; set base_lr of the parameter groups"
        )
    names = [name for name, _ in model.named_parameters()]
    for part in lr_multipliers:
        if not any(part in name for name in names):
            close = nearest(part, {piece for name in names for piece in name.split(".")})
            raise UserError(f"lr_multipliers: no parameter name contains {part!r}{close}")
    if weight_decay_heads is not None and not any(map(_in_backbone, names)):
        raise UserError(
            f"SOLVER.WEIGHT_DECAY_HEADS / weight_decay_heads = {weight_decay_heads} is for what is "
            f"outside the backbone, but {type(model).__name__} has no 'backbone'; leave it out"
        )
    layer_factor = _layer_factors(model, layer_decay)
    has_pyramid = any(name.startswith("backbone.bottom_up.") for name in names)

    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter, in_norm in _trainable(model):
        is_bias = name.rpartition(".")[2] == "bias"
        rules = (  # the first one that is given counts
            (0.0, any(part in name for part in no_decay_names)),
            (weight_decay_heads, not _in_backbone(name, has_pyramid)),
            (weight_decay_bias, is_bias),
            (weight_decay_norm, in_norm),
            (weight_decay_1d, parameter.ndim <= 1),
        )
        given = (value for value, applies in rules if applies and value is not None)
        decay = next(given, weight_decay)
        lr = base_lr
        if lr is not None:
            lr = lr * layer_factor(name) * _multiplier(name, lr_multipliers)
            lr *= bias_lr_factor if is_bias else 1.0
        settings = {"lr": lr, "weight_decay": decay}
        settings = {key: value for key, value in settings.items() if value is not None}
        group = groups.setdefault((lr, decay), {"params": [], **settings})
        group["params"].append(parameter)
    if not groups:
        raise UserError("the model has no trainable parameter; unfreeze some of it")
    return list(groups.values())


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, bool]]:
    """Yield (name, parameter, whether it belongs to a norm layer), shared parameters once."""
    seen = set()
    for prefix, module in model.named_modules():
        norm = is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{name}" if prefix else name, parameter, norm


def _in_backbone(name: str, has_pyramid: bool = False) -> bool:
    return name.startswith("backbone.bottom_up." if has_pyramid else "backbone.")


def _multiplier(name: str, lr_multipliers: Mapping[str, float]) -> float:
    return next((factor for part, factor in lr_multipliers.items() if part in name), 1.0)


def _layer_factors(model: nn.Module, layer_decay: float) -> Callable[[str], float]:
    """Return the function parameter name -> factor of its layer."""
    if layer_decay == 1.0:
        return lambda name: 1.0
    layered = [
        (f"{prefix}." if prefix else "", module)
        for prefix, module in model.named_modules()
        if callable(getattr(module, "layer_id", None)) and hasattr(module, "num_layers")
    ]
    if not layered:
        raise UserError(
            f"layer_decay={layer_decay} needs a backbone that numbers its layers (layer_id, "
            f"num_layers) and {type(model).__name__} has none; set layer_decay to 1.0"
        )

    def factor(name: str) -> float:
        for prefix, module in layered:
            if name.startswith(prefix):
                layer = module.layer_id(name[len(prefix) :])
                if layer is not None:
                    return layer_decay ** max(0, module.num_layers + 1 - layer)
        return 1.0

    return factor


def _clip_value(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    parts = [local_part(each) for each in gradients]
    torch._foreach_clamp_min_(parts, -limit)
    torch._foreach_clamp_max_(parts, limit)


def _clip_each_norm(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    factors = (limit / (_norms(gradients, norm_type) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(each) for each in gradients], list(factors))


def _clip_total_norm(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    total = torch.linalg.vector_norm(_norms(gradients, norm_type), norm_type)
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(each) for each in gradients], factor)


def _norms(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norm of each gradient, ``(len(gradients),)``; of the whole ones, where processes
    share them out.
    """
    shared = next((each for each in gradients if isinstance(each, DTensor)), None)
    parts = [local_part(each) for each in gradients]
    if shared is not None:  # a small tensor may leave some processes without a part
        parts = [part if part.numel() else part.new_zeros(1) for part in parts]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts, norm_type)])
    if shared is None:
        return norms
    group = shared.device_mesh.get_group()
    if norm_type == float("inf"):
        dist.all_reduce(norms, dist.ReduceOp.MAX, group=group)
        return norms
    norms = norms**norm_type
    dist.all_reduce(norms, group=group)
    return norms ** (1 / norm_type)


_CLIPPERS = {"value": _clip_value, "norm": _clip_each_norm, "full_model": _clip_total_norm}
CLIP_TYPES = tuple(_CLIPPERS)


class GradientClipper:
    """Bound gradients in place, without a host sync.

    Args:
        clip_type: ``value`` limits each element, ``norm`` the norm of each parameter's gradient
            (Detectron2's meaning), ``full_model`` the norm of all gradients together.
        clip_value: the limit, > 0.
        norm_type: order p of the norm; ``inf`` allowed.
    """

    def __init__(self, *, clip_type: str, clip_value: float, norm_type: float = 2.0):
        if clip_type not in _CLIPPERS:
            raise UserError(
                f"gradient clipping type {clip_type!r}, expected one of {', '.join(CLIP_TYPES)}"
            )
        if not clip_value > 0:
            raise UserError(f"the gradient clipping limit must be positive, found {clip_value}")
        self.clip_type = clip_type
        self.clip_value = clip_value
        self.norm_type = norm_type

    def __call__(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            with torch.no_grad():
                _CLIPPERS[self.clip_type](gradients, self.clip_value, self.norm_type)
