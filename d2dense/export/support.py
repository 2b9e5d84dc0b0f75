"""What can be exported how, known before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import nn

from d2dense.errors import UserError
from d2dense.modeling.detr import DeformableDETR
from d2dense.modeling.mask2former import Mask2Former
from d2dense.modeling.necks import HRFPN, NASFPN, BiFPN

from .adapters import adapt

__all__ = ["WAYS", "Rule", "check_supported", "refusal", "refuses", "way"]

# Every way of exporting: TorchScript's two methods, and formats that have no method.
WAYS = ("trace", "script", "torch_export", "onnx")

# Returns why a model cannot be exported, None where nothing speaks against it.
Rule = Callable[[nn.Module], "str | None"]

_RULES: dict[str, list[Rule]] = {name: [] for name in WAYS}


def refuses(*ways: str) -> Callable[[Rule], Rule]:
    """Decorate a rule that these of :data:`WAYS` obey.

    A reason says in one line what was found, what was expected, and what to use instead.
    """

    def register(rule: Rule) -> Rule:
        for name in ways:
            _RULES[name].append(rule)
        return rule

    return register


def way(format: str, method: str = "trace") -> str:
    """Return which of :data:`WAYS` a format and a method are."""
    return method if format == "torchscript" else format


def refusal(model: nn.Module, format: str, method: str = "trace") -> str | None:
    """Return in one line why ``model`` cannot be exported, None where nothing is known against it.

    It looks at the model's modules and runs nothing. What it does not know shows when the model is
    converted: as the compiler's own message, or as a failed check.

    Args:
        model: any model, also on the meta device.
        format: ``torchscript``, ``torch_export`` or ``onnx``.
        method: of TorchScript, ``trace`` or ``script``.
    """
    try:
        exported = adapt(model).model  # without what only training needs
    except UserError as error:
        return str(error)
    reasons = (rule(exported) for rule in _RULES[way(format, method)])
    return next((reason for reason in reasons if reason is not None), None)


def check_supported(model: nn.Module, format: str, method: str = "trace") -> None:
    """Raise a ``UserError`` with the reason of :func:`refusal` where there is one."""
    reason = refusal(model, format, method)
    if reason is not None:
        raise UserError(reason)


@refuses("script")
def _queries(model: nn.Module) -> str | None:
    if not isinstance(model, (DeformableDETR, Mask2Former)):
        return None
    return (
        f"a detection transformer ({type(model).__name__}) cannot be scripted: its memory and "
        "queries are Python objects; expected an R-CNN, RetinaNet, segmenter or classifier; use "
        "--method trace"
    )


@refuses("script")
def _detectron2_cascade(model: nn.Module) -> str | None:
    if type(getattr(model, "roi_heads", None)) is not CascadeROIHeads:
        return None
    return (
        "Detectron2's CascadeROIHeads cannot be scripted: it keeps the stage's matches in Python; "
        "use FlexibleCascadeROIHeads (MODEL.ROI_HEADS.NAME), the same model with the same "
        "parameter names, or --method trace"
    )


@refuses("script")
def _pyramids(model: nn.Module) -> str | None:
    found = next((m for m in model.modules() if isinstance(m, (BiFPN, NASFPN, HRFPN))), None)
    if found is None:
        return None
    return (
        f"{type(found).__name__} cannot be scripted: it looks its levels up by Python's means; "
        "expected an FPN or CEDNet, or use --method trace"
    )


@refuses("script")
def _timm_features(model: nn.Module) -> str | None:
    found = next((module for module in model.modules() if _is_hooked(module)), None)
    if found is None:
        return None
    return (
        f"timm's {type(found).__name__} cannot be scripted: it collects feature maps by Python "
        "calls; expected a timm model that lists its stages (ConvNeXt, Swin, ResNet, HRNet), or "
        "use --method trace"
    )


def _is_hooked(module: Any) -> bool:
    from timm.models import _features, _features_fx

    kinds = (_features.FeatureHookNet, _features.FeatureGetterNet, _features_fx.FeatureGraphNet)
    return isinstance(module, kinds)
