"""The configs that projects bring, by the names of the model zoo."""

from __future__ import annotations

from pathlib import Path

from d2dense import projects
from d2dense.errors import UserError, nearest

__all__ = ["get_config_file", "list_models"]

_SUFFIX = {"lazy": ".py", "yaml": ".yaml"}


def list_models(kind: str | None = None) -> list[str]:
    """Return every model name, sorted; with ``kind`` only those that have a config of that kind."""
    _check_kind(kind)
    suffixes = [_SUFFIX[kind]] if kind else list(_SUFFIX.values())
    return sorted(
        {
            f"{project}/{path.stem}"
            for project in projects.names()
            for path in projects.config_folder(project).glob("*")
            if path.suffix in suffixes and not path.name.startswith(("_", "base"))
        }
    )


def get_config_file(name: str, kind: str | None = None) -> Path:
    """Return the path of a model's config; without ``kind`` the lazy one where there is one.

    Raises:
        UserError: an unknown name (with the nearest known one), or no config of that kind.
    """
    _check_kind(kind)
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{nearest(name, list_models())}")
    project, _, stem = name.partition("/")
    for each in [kind] if kind else ["lazy", "yaml"]:
        path = projects.config_folder(project) / f"{stem}{_SUFFIX[each]}"
        if path.is_file():
            return path
    raise UserError(f"model {name!r} has no {kind} config; use the other kind")


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in _SUFFIX:
        raise UserError(f"config kind {kind!r}, expected 'lazy' or 'yaml'")
