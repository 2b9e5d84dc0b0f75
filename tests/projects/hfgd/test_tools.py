"""The project's commands, on an untrained small model."""

import csv
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from d2dense import model_zoo
from d2dense.errors import UserError

CONFIG = "HFGD/semantic_fpn_tiny_shapes"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model_zoo.get_model(CONFIG).state_dict()}, path)
    return str(path)


def command(repo_root, name):
    path = repo_root / "projects" / "HFGD" / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def rows(path):
    with path.open() as file:
        return list(csv.reader(file))


def test_label_maps_of_two_models_on_a_users_folder(repo_root, weights, tmp_path):
    values = np.random.default_rng(0).integers(0, 15, (40, 56)).astype(np.uint8)
    for folder, picture in (("images", np.stack([values * 16] * 3, -1)), ("labels", values)):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture).save(tmp_path / folder / "a.png")
    (tmp_path / "names.txt").write_text("\n".join(f"class {k}" for k in range(15)))
    slots = [
        f"datasets.{slot}.{key}={tmp_path / name}"
        for slot in ("train", "val")
        for key, name in (("images", "images"), ("labels", "labels"), ("classes", "names.txt"))
    ]
    models = [*("--config-file", CONFIG, "--weights", weights, "--name", "A")]
    models += [*("--config-file", CONFIG, "--weights", weights, "--name", "B")]
    main = command(repo_root, "label_maps")
    assert main([*models, "--device", "cpu", "--output", str(tmp_path / "out"), *slots]) == 0
    header, *found = rows(tmp_path / "out" / "label_maps.csv")
    assert header == ["image", "model", "mIoU"]
    assert [row[1] for row in found] == ["A", "B"]
    assert Image.open(tmp_path / "out" / "label_maps.png").size[0] > 0
    custom = [
        *("--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")),
        *("--classes", str(tmp_path / "names.txt")),
    ]
    out = tmp_path / "by_flags"
    assert main([*models, "--device", "cpu", "--output", str(out), *custom]) == 0
    assert rows(out / "label_maps.csv") == [header, *found]


def test_a_detector_has_no_label_maps_to_draw(repo_root, tmp_path):
    command_line = ["--config-file", "FSCascade/fscascade_tiny_shapes", "--output", str(tmp_path)]
    with pytest.raises(UserError, match="this analysis is for semantic segmenters"):
        command(repo_root, "label_maps")(command_line)


def test_kernel_similarity_has_a_row_per_class(repo_root, weights, tmp_path):
    main = command(repo_root, "kernel_similarity")
    model = ["--config-file", CONFIG, "--weights", weights, "--device", "cpu"]
    assert main([*model, "--output", str(tmp_path)]) == 0
    header, *found = rows(tmp_path / "kernel_similarity.csv")
    assert len(found) == 15
    assert len(header) == 17
    for k, row in enumerate(found):
        assert float(row[2 + k]) == pytest.approx(1, abs=1e-4)
