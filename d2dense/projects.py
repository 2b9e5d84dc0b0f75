"""Where the projects are: found in a checkout's ``projects`` folder, in the folders that the
environment variable ``D2DENSE_PROJECTS`` lists, or among installed packages by entry point.

A project called ``FSCascade`` is the package ``fscascade``; importing it registers its modules, its
function ``add_fscascade_config(cfg)`` adds its yacs keys, and its configs lie in the ``configs``
folder beside the package (checkout) or inside it (installed).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from d2dense.errors import UserError

__all__ = [
    "ENTRY_POINT_GROUP",
    "FOLDERS_VARIABLE",
    "add_project_configs",
    "config_folder",
    "import_all",
    "names",
]

ENTRY_POINT_GROUP = "d2dense.projects"
FOLDERS_VARIABLE = "D2DENSE_PROJECTS"  # separated as in PATH; each is like the checkout's folder
_CHECKOUT = Path(__file__).resolve().parents[1] / "projects"


def _folders() -> list[Path]:
    """Return the folders of projects: the checkout's, and the user's own.

    Raises:
        UserError: the environment variable names what is no folder.
    """
    own = [Path(each) for each in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if each]
    for folder in own:
        if not folder.is_dir():
            raise UserError(
                f"{FOLDERS_VARIABLE} names {folder}, which is no folder; expected folders like "
                f"{_CHECKOUT}, separated by {os.pathsep!r}"
            )
    return [_CHECKOUT, *(folder.resolve() for folder in own)]


def _in_folders() -> Iterator[tuple[str, str, Path]]:
    """Yield name, package and folder of every project that is found in a folder."""
    for root in _folders():
        for folder in sorted(root.glob("*/")):
            package = folder.name.lower()
            if (folder / package / "__init__.py").is_file():
                yield folder.name, package, folder


@functools.cache
def _packages() -> dict[str, str]:
    """Map project names to importable package names; those in folders come before installed ones.

    Raises:
        UserError: two folders have a project of the same package name.
    """
    places: dict[str, Path] = {}
    found = {
        point.name: point.value
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    for name, package, folder in _in_folders():
        if places.setdefault(package, folder) != folder:
            raise UserError(
                f"{folder} and {places[package]} are both the project {name!r}; rename one of "
                f"them, or take its folder out of {FOLDERS_VARIABLE}"
            )
        found[name] = package
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Return the names of all projects that can be imported, sorted."""
    return list(_packages())


@functools.cache
def import_all() -> dict[str, ModuleType]:
    """Import every project, which registers its modules with Detectron2, and return them by
    project name.
    """
    return {name: importlib.import_module(package) for name, package in _packages().items()}


def add_project_configs(cfg) -> None:
    """Let every project add its keys to a yacs ``CfgNode``, in place."""
    for module in import_all().values():
        add = getattr(module, f"add_{module.__name__}_config", None)
        if add is not None:
            add(cfg)


def config_folder(name: str) -> Path:
    """Return the folder that holds the configs of the project ``name``."""
    package = Path(str(import_all()[name].__file__)).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
