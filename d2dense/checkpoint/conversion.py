"""Weights of other code bases under this library's names, and back.

A *source* is a code base. Given a model of ours and the names in a file, it says which of its names
belongs to which of ours; everything else is an error, so that nothing is lost in silence.
Projects register their sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from d2dense import projects
from d2dense.errors import UserError, nearest

__all__ = [
    "Conversion",
    "Correspondence",
    "Source",
    "convert",
    "convert_back",
    "convert_with_report",
    "recognise",
    "register_source",
    "sources",
]


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """Which names are the same tensor.

    Attributes:
        names: ours -> theirs.
        constants: their tensors that our modules compute; name -> value.
        unused: pattern (``re.match``) of their names that the model has no place for by design,
            such as the classifier of pre-training.
        fresh: pattern of our names that such files do not hold by design.
        layouts: our name -> (to ours, to theirs) where the values are ordered differently.
        class_keys: pattern of their names whose shape follows the number of classes -> the config
            key of that number.
    """

    names: Mapping[str, str]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    unused: str = "$^"
    fresh: str = "$^"
    layouts: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = field(
        default_factory=dict
    )
    class_keys: Mapping[str, str] = field(default_factory=dict)

    def class_key(self, theirs: str) -> str | None:
        """Return the config key of the number of classes that a tensor's shape follows, if any."""
        return next((key for name, key in self.class_keys.items() if re.match(name, theirs)), None)


Source = Callable[[nn.Module, Collection[str]], Correspondence]
Recogniser = Callable[[nn.Module, Collection[str]], bool]

_SOURCES: dict[str, Source] = {}
_RECOGNISERS: dict[str, Recogniser] = {}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Converted weights, and what became of every name.

    Attributes:
        weights: under our names.
        unused: their names that the model has no place for, as expected.
        missing: our names that the file does not hold, as expected.
    """

    weights: dict[str, Tensor]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


def register_source(name: str, source: Source, *, recognise: Recogniser | None = None) -> None:
    """Make ``source`` known as ``name``.

    Args:
        recognise: whether a file with such names is of this source and ``model`` another kind of
            model; initial weights are then converted without being asked for.
    """
    if name in _SOURCES:
        raise ValueError(f"the source {name!r} is registered already")
    _SOURCES[name] = source
    if recognise is not None:
        _RECOGNISERS[name] = recognise


def recognise(model: nn.Module, names: Collection[str]) -> str | None:
    """Return the source that recognises a file with ``names`` as its own, for ``model``."""
    return next((name for name, is_own in _RECOGNISERS.items() if is_own(model, names)), None)


def sources() -> list[str]:
    """Return the names of all sources, also those of the projects, sorted."""
    projects.import_all()
    return sorted(_SOURCES)


def convert(state_dict: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ``state_dict``, named as ``source`` does, under the names of ``model``.

    Raises:
        UserError: an unknown source, or tensors that are missing, unused or of another shape
            although they should not be.
    """
    return convert_with_report(state_dict, source, model).weights


def convert_with_report(
    state_dict: Mapping[str, Tensor], source: str, model: nn.Module
) -> Conversion:
    """Like :func:`convert`, with an account of every name."""
    theirs = _without_wrapper(state_dict)
    known = _correspondence(source, model, theirs)
    own = model.state_dict()
    weights, missing, misshaped = {}, [], []
    for name, value in own.items():
        other = known.names.get(name)
        if other in theirs:
            found = theirs[other]
            if name in known.layouts:
                found = known.layouts[name][0](found)
            if found.shape != value.shape:
                misshaped.append((name, found, value))
            weights[name] = found
        else:
            missing.append(name)
    _check_shapes(misshaped, known)
    used = {known.names[name] for name in weights}
    unused = [name for name in theirs if name not in used and name not in known.constants]
    _check(unused, known.unused, f"tensors that {type(model).__name__} has no place for")
    _check(missing, known.fresh, f"no weights for tensors of {type(model).__name__}")
    unused += [name for name in theirs if name in known.constants]
    return Conversion(weights=weights, unused=tuple(unused), missing=tuple(missing))


def convert_back(model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return the state of ``model`` under the names of ``source``.

    Raises:
        UserError: an unknown source, or tensors that it has no name for.
    """
    known = _correspondence(source, model, ())
    own = model.state_dict()
    nameless = [name for name in own if name not in known.names]
    if nameless:
        raise UserError(f"{source} has no names for {_shortened(nameless)}")
    result = {}
    for name, value in own.items():
        to_theirs = known.layouts[name][1] if name in known.layouts else None
        result[known.names[name]] = to_theirs(value) if to_theirs else value
    return result | dict(known.constants)


def _correspondence(source: str, model: nn.Module, names: Collection[str]) -> Correspondence:
    if source not in sources():
        raise UserError(
            f"unknown source {source!r}, expected one of {', '.join(sources())}"
            f"{nearest(source, sources())}"
        )
    return _SOURCES[source](model, names)


def _without_wrapper(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefix that training on several devices leaves in front of every name."""
    if state_dict and all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return dict(state_dict)


def _check(names: list[str], expected: str, what: str) -> None:
    # counts of batches that norms have seen influence nothing
    surprising = [
        name
        for name in names
        if not re.match(expected, name) and not name.endswith("num_batches_tracked")
    ]
    if surprising:
        raise UserError(
            f"the file has {what}: {_shortened(surprising)}; use the config of the model that the "
            "file belongs to"
        )


def _check_shapes(misshaped: list[tuple[str, Tensor, Tensor]], known: Correspondence) -> None:
    """Raise a ``UserError`` that names (ours, in the file, in the model) and what to change."""
    if not misshaped:
        return
    described, keys = [], set()
    for ours, found, expected in misshaped:
        theirs = known.names[ours]
        described.append(
            f"{theirs} has shape {tuple(found.shape)} in the file, but {ours} has "
            f"{tuple(expected.shape)}"
        )
        keys |= {known.class_key(theirs)}
    named = sorted(key for key in keys if key is not None)
    if len(named) < len(keys):
        remedy = "use the config of the model that the file belongs to (number of classes, widths)"
    else:
        remedy = (
            f"set {' and '.join(named)} to the file's number of classes; training on "
            "another number starts with these tensors afresh where TRAIN.REINIT_MISSHAPED "
            "(train.reinit_misshaped) is true"
        )
    raise UserError(f"{_shortened(described)}; {remedy}")


def _shortened(names: Collection[str], count: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
