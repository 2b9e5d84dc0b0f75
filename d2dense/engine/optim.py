"""Optimizer parameter groups and gradient clipping."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from d2dense.errors import UserError, nearest

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
        no_decay_names: parts of parameter names (such as ``pos_embed``) that get no weight decay.
        bias_lr_factor: factor on the learning rate of parameters named ``bias``.
        lr_multipliers: part of a parameter name -> factor on its learning rate; the first match
            counts.
        layer_decay: factor per layer counted from the end of each submodule that has ``num_layers``
            and ``layer_id(parameter_name) -> int | None`` (0 is the stem, None means no decay):
            ``layer_decay ** (num_layers + 1 - layer_id)``.

    Raises:
        UserError: a multiplier that matches nothing, or layer decay on a model without layers.
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
    layer_factor = _layer_factors(model, layer_decay)

    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter, in_norm in _trainable(model):
        is_bias = name.rpartition(".")[2] == "bias"
        decay = weight_decay
        if in_norm and weight_decay_norm is not None:
            decay = weight_decay_norm
        if is_bias and weight_decay_bias is not None:
            decay = weight_decay_bias
        if any(part in name for part in no_decay_names):
            decay = 0.0
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
                    return layer_decay ** (module.num_layers + 1 - layer)
        return 1.0

    return factor


def _clip_value(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    torch._foreach_clamp_min_(gradients, -limit)
    torch._foreach_clamp_max_(gradients, limit)


def _clip_each_norm(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    norms = torch._foreach_norm(gradients, norm_type)
    torch._foreach_mul_(gradients, [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in norms])


def _clip_total_norm(gradients: list[torch.Tensor], limit: float, norm_type: float) -> None:
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, norm_type)])
    total = torch.linalg.vector_norm(norms, norm_type)
    torch._foreach_mul_(gradients, (limit / (total + 1e-6)).clamp(max=1.0))


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
