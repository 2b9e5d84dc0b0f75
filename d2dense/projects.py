"""Where the projects are: found in a checkout's ``projects`` folder, or among installed packages by
entry point.

A project called ``FSCascade`` is the package ``fscascade``; importing it registers its modules, its
function ``add_fscascade_config(cfg)`` adds its yacs keys, and its configs lie in the ``configs``
folder beside the package (checkout) or inside it (installed).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["ENTRY_POINT_GROUP", "add_project_configs", "config_folder", "import_all", "names"]

ENTRY_POINT_GROUP = "d2dense.projects"
_CHECKOUT = Path(__file__).resolve().parents[1] / "projects"


@functools.cache
def _packages() -> dict[str, str]:
    """Map project names to importable package names; a checkout's own projects come first."""
    found = {
        point.name: point.value
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    for folder in sorted(_CHECKOUT.glob("*/")):
        package = folder.name.lower()
        if (folder / package / "__init__.py").is_file():
            found[folder.name] = package
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
    package = Path(import_all()[name].__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
