"""Packaging: the shared library and one package per project, configs included."""

import importlib.util
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def requirements() -> list[str]:
    lines = (ROOT / "requirements" / "runtime.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def packages() -> dict[str, str]:
    """Map importable package names to folders: d2dense, every project package, and each project's
    configs.
    """
    found = {}
    roots = {"d2dense": ROOT / "d2dense"}
    for project in sorted((ROOT / "projects").iterdir()):
        name = project.name.lower()
        if (project / name / "__init__.py").is_file():
            roots[name] = project / name
            for folder in [project / "configs", *sorted((project / "configs").rglob("*/"))]:
                if folder.is_dir() and folder.name != "__pycache__":
                    suffix = ".".join(folder.relative_to(project).parts)
                    found[f"{name}.{suffix}"] = str(folder.relative_to(ROOT))
    for name, root in roots.items():
        for init in sorted(root.rglob("__init__.py")):
            suffix = ".".join(init.parent.relative_to(root).parts)
            found[f"{name}.{suffix}" if suffix else name] = str(init.parent.relative_to(ROOT))
    return found


def detectron2_requirement() -> list[str]:
    """Point at a locally built detectron2 wheel when the target environment has none, so that one
    pip command is enough.
    """
    spec = importlib.util.spec_from_file_location(
        "installer", ROOT / "d2dense" / "install_detectron2.py"
    )
    installer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installer)
    return installer.local_requirement(ROOT / "build" / "detectron2")


PACKAGES = packages()
# A project's package has its folder's name in lower case; d2dense/projects.py finds it by this.
PROJECTS = [
    f"{project.name} = {project.name.lower()}"
    for project in sorted((ROOT / "projects").iterdir())
    if project.name.lower() in PACKAGES
]

setup(
    name="d2dense",
    version=re.search(
        r'__version__ = "(.+)"', (ROOT / "d2dense" / "__init__.py").read_text()
    ).group(1),
    description="CEDNet, Co-DETR, FSCascade and HFGD for Detectron2",
    python_requires=">=3.10,<3.14",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={name: ["*.yaml", "*.json"] for name in PACKAGES},
    install_requires=requirements() + detectron2_requirement(),
    entry_points={"d2dense.projects": PROJECTS},
    extras_require={
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "wandb": ["wandb"],
        "lvis": ["lvis"],
    },
)
