"""The project's commands on the tiny model: train two steps, evaluate by stage, draw."""

import importlib.util
import json

import pytest
import torch

from d2dense import model_zoo
from d2dense.data import shapes
from d2dense.engine import train_net
from d2dense.errors import UserError, run_tool

CONFIG = "FSCascade/fscascade_tiny_shapes"


@pytest.fixture(scope="module")
def tools(repo_root):
    def load(name):
        path = repo_root / "projects/FSCascade/tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return {name: load(name) for name in ("evaluate_stages", "draw_figures")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Overrides that point the tiny config to eight generated pictures."""
    root = tmp_path_factory.mktemp("shapes")
    for split in ("train", "val"):
        shapes.generate(output_dir=root, split=split, count=8, size=96, seed=0)
    return [
        f"datasets.{split}.{key}={root / path.format(split)}"
        for split in ("train", "val")
        for key, path in (("json", "annotations/instances_{}.json"), ("images", "images/{}"))
    ]


def test_train_evaluate_by_stage_and_draw(tools, data, tmp_path):
    run = tmp_path / "run"
    settings = [
        "train.max_iter=2",
        "dataloader.train.total_batch_size=2",
        f"train.output_dir={run}",
    ]
    assert train_net.main(["--config-file", CONFIG, *data, *settings]) == 0
    weights, stages = run / "model_final.pth", tmp_path / "stages"
    command = ["--config-file", CONFIG, "--weights", str(weights), "--output", str(stages), *data]
    assert tools["evaluate_stages"].main(command) == 0
    results = json.loads((stages / "results.json").read_text())
    assert {"stage1", "stage2", "stage3", "ensemble_last_rois"} <= results.keys()
    figures = tmp_path / "figures"
    command = ["--results", f"ours={stages}", "--output", str(figures)]
    assert tools["draw_figures"].main(command) == 0
    assert {f.name for f in figures.glob("*.png")} == {
        "ap_differences.png", "ap_by_iou.png", "confidence.png",
    }  # fmt: skip


def test_mistakes_are_one_line(tools, data, tmp_path, capsys):
    command = ["--config-file", CONFIG, "--output", str(tmp_path), *data]
    assert run_tool(lambda: tools["evaluate_stages"].main(command)) == 2
    assert "trained weights are needed, give --weights FILE" in capsys.readouterr().err
    command = ["--results", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert run_tool(lambda: tools["draw_figures"].main(command)) == 2
    assert "run evaluate_stages.py" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(tools, data, tmp_path):
    other = model_zoo.get_model("FSCascade/cascade_rcnn_tiny_shapes")
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    command = ["--config-file", CONFIG, "--weights", str(tmp_path / "other.pth")]
    with pytest.raises(UserError):
        tools["evaluate_stages"].main([*command, "--output", str(tmp_path / "out"), *data])
