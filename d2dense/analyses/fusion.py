"""Time of the first fusion: the share of a backbone's parameters that work before features of
several scales are fused for the first time (section 3 of the CEDNet paper).

The whole is the backbone as a detector has it, a neck included, without the detector's heads. What
lies before the first fusion cannot be seen from outside, so there is a rule for each kind of
backbone. Known here are pyramids (any module with a ``bottom_up``, such as Detectron2's FPN) and
timm's HRNet; a project adds its own by :func:`register_fusion_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from d2dense.errors import UserError
from d2dense.modeling import TimmBackbone

__all__ = ["FusionTime", "fusion_time", "register_fusion_rule"]

Rule = Callable[[nn.Module], Iterable[nn.Module]]
_rules: dict[type[nn.Module], Rule] = {}


@dataclass(frozen=True)
class FusionTime:
    """
    Attributes:
        before: parameters of what runs before the first fusion
        whole: parameters of the backbone
    """

    before: int
    whole: int

    @property
    def share(self) -> float:
        return self.before / self.whole


def register_fusion_rule(kind: type[nn.Module], rule: Rule) -> None:
    """Let backbones of ``kind`` and its subclasses be analysed.

    Args:
        rule: returns the parts of such a backbone that run before its first fusion; raises a
            ``UserError`` where it fuses nothing.
    """
    _rules[kind] = rule


def fusion_time(model: nn.Module) -> FusionTime:
    """Count the parameters of a model's backbone before its first fusion.

    Args:
        model: a detector with a ``backbone``, or the backbone itself; on any device, meta too.

    Raises:
        UserError: a backbone that there is no rule for.
    """
    backbone = getattr(model, "backbone", model)
    return FusionTime(_count(_parts_before(backbone)), _count([backbone]))


def _count(modules: Iterable[nn.Module]) -> int:
    """Count each parameter once."""
    found = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(found.values())


def _parts_before(backbone: nn.Module) -> Iterable[nn.Module]:
    rule = _rule_of(backbone)
    if rule is not None:
        return rule(backbone)
    inner = getattr(backbone, "bottom_up", None)
    if inner is not None:
        # a network that fuses by itself does so before the pyramid around it
        return [inner] if _rule_of(inner) is None else _parts_before(inner)
    raise UserError(
        f"it is not known where {_name(backbone)} fuses features first; known are pyramids "
        f"(with a bottom_up), timm's HRNet{''.join(f', {kind.__name__}' for kind in _rules)}; "
        "others are added by d2dense.analyses.fusion.register_fusion_rule"
    )


def _rule_of(backbone: nn.Module) -> Rule | None:
    if isinstance(backbone, TimmBackbone):
        return _before_hrnet_fuses if _is_hrnet(backbone.model) else None
    return next((rule for kind, rule in _rules.items() if isinstance(backbone, kind)), None)


def _is_hrnet(model: nn.Module) -> bool:
    from timm.models.hrnet import HighResolutionNet  # slow to import, and only needed here

    return isinstance(model, HighResolutionNet)


def _before_hrnet_fuses(backbone: TimmBackbone) -> list[nn.Module]:
    """Stem, first stage, and the second stage's two branches up to its first exchange."""
    net = backbone.model
    first_exchange = net.stage2[0]
    stem = [net.conv1, net.bn1, net.conv2, net.bn2, net.layer1]
    return [*stem, net.transition1, first_exchange.branches]


def _name(backbone: nn.Module) -> str:
    if isinstance(backbone, TimmBackbone):
        return f"timm's {type(backbone.model).__name__}"
    return type(backbone).__name__
