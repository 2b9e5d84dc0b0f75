"""From an ImageNet classifier to a detector: which tensors are the same.

A checkpoint of this launcher's classifier (or of timm's ``cednet_*``) needs no conversion: loading
initial weights recognises it, takes the trunk, leaves the classifiers behind, and starts all the
rest of the detector afresh.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from d2dense.checkpoint import Correspondence

from .trunk import CEDNetTrunk

__all__ = ["classifier_correspondence", "is_classifier_file"]

_TRUNK = re.compile(r"((?:network\.)?trunk\.)stem\.")
_HEADS = r"(network\.)?heads?\."


def is_classifier_file(model: nn.Module, names: Collection[str]) -> bool:
    """Whether ``names`` are those of a CEDNet classifier, and ``model`` is another model with one
    trunk.
    """
    return (
        _file_prefix(names) is not None
        and any(re.match(_HEADS, name) for name in names)
        and _trunk_path(model) not in (None, _file_prefix(names))
    )


def classifier_correspondence(model: nn.Module, names: Collection[str]) -> Correspondence:
    """Return the names of a classifier's file for ``model`` (the source ``cednet_classifier``).

    A last decoder, which U-Net- and Hourglass-style detectors have and classifiers do not, starts
    afresh; any other difference between the trunks is an error.
    """
    ours, theirs = _trunk_path(model) or "", _file_prefix(names) or "network.trunk."
    trunk = model.get_submodule(ours.rstrip("."))
    pairs = {ours + name: theirs + name for name in trunk.state_dict()}
    escaped, last = re.escape(ours), len(trunk.stages) - 1
    return Correspondence(
        names=pairs,
        unused=_HEADS,
        fresh=rf"(?!{escaped})|{escaped}stages\.{last}\.decoder\.",
    )


def _file_prefix(names: Collection[str]) -> str | None:
    found = {match[1] for match in map(_TRUNK.match, names) if match}
    return found.pop() if len(found) == 1 else None


def _trunk_path(model: nn.Module) -> str | None:
    """Return where the only trunk of ``model`` is, with a dot at the end."""
    found = [f"{path}." for path, part in model.named_modules() if isinstance(part, CEDNetTrunk)]
    return found[0] if len(found) == 1 else None
