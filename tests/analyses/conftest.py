"""Commands, generated pictures, weights and configs that the tests of this folder share."""

import importlib.util

import pytest
import torch

from d2dense import model_zoo
from d2dense.data import shapes
from tests.analyses.tiny import build


@pytest.fixture(scope="session")
def codetr_tool(repo_root):
    """Return a command of the project by its name."""

    def load(name):
        path = repo_root / "projects/CoDETR/tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"codetr_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory):
    """``--json`` and ``--images`` of four generated pictures."""
    root = tmp_path_factory.mktemp("shapes")
    shapes.generate(output_dir=root, split="val", count=4, size=96, seed=0)
    annotations = root / "annotations" / "instances_val.json"
    return ["--json", str(annotations), "--images", str(root / "images" / "val")]


@pytest.fixture(scope="session")
def save_weights(tmp_path_factory):
    """Return a function that writes random weights of a config, told apart by their seed."""
    folder = tmp_path_factory.mktemp("weights")

    def save(path, seed=0):
        torch.manual_seed(seed)
        file = folder / f"{abs(hash(str(path)))}_{seed}.pth"
        torch.save({"model": build(path).state_dict()}, file)
        return str(file)

    return save


@pytest.fixture
def both_kinds():
    """Return a function from a model-zoo name to its two config files."""
    return lambda name: [str(model_zoo.get_config_file(name, kind)) for kind in ("lazy", "yaml")]
