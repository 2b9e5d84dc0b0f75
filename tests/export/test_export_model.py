"""From a config and a checkpoint to a checked file, and its evaluation."""

import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import pytest
import torch

from d2dense import config
from d2dense.data import shapes
from d2dense.engine.experiment import experiment
from d2dense.engine.trainer import evaluate_model
from d2dense.errors import run_tool
from d2dense.export import CheckError, evaluate_exported, load, verification
from d2dense.export import pipeline as pipeline_module
from tests.export.exportable import picture

CONFIG = "FSCascade/fscascade_tiny_shapes"


@pytest.fixture(scope="module")
def main(request):
    path = request.config.rootpath / "tools" / "export_model.py"
    spec = importlib.util.spec_from_file_location("export_model_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Overrides that make six generated pictures the only test set."""
    folder = tmp_path_factory.mktemp("data")
    shapes.generate(output_dir=folder, split="val", count=6, size=96, seed=5)
    node = {
        "json": str(folder / "annotations" / "instances_val.json"),
        "images": str(folder / "images" / "val"),
    }
    slots = [
        f"datasets.{slot}.{key}={value}" for slot in ("train", "val") for key, value in node.items()
    ]
    sizes = ["min_size=[96]", "max_size=128"]
    steps = "dataloader.test.mapper.augmentations"
    return [
        *slots,
        *(f"{steps}.{size}" for size in sizes),
        "model.roi_heads.box_predictors.0.test_score_thresh=0.1",
    ]


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """A checkpoint whose scores and boxes differ from picture to picture."""
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    torch.manual_seed(0)
    model = experiment(config.load(CONFIG, data)).build_model()
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "bbox_pred.weight")):
            parameter.data.normal_(std=0.2 if "cls" in name else 0.02)
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def exported(main, data, weights, tmp_path_factory):
    """The folder that the tool wrote by scripting."""
    folder = tmp_path_factory.mktemp("exported")
    flags = ["--weights", weights, "--output", str(folder), "--method", "script"]
    assert main(["--config-file", CONFIG, *flags, *data]) in (0, None)
    return folder


def test_tool_prints_the_check(
    main, data, weights, tmp_path, capsys, monkeypatch, checks_of_files_start_in_a_moment
):
    monkeypatch.setattr(verification, "_run_fresh", checks_of_files_start_in_a_moment)
    cv2.imwrite(str(tmp_path / "in.png"), picture(120, 90).permute(1, 2, 0).numpy())
    flags = ["--weights", weights, "--output", str(tmp_path / "out")]
    flags += ["--format", "torchscript", "--sample-image", str(tmp_path / "in.png"), "--evaluate"]
    assert run_tool(lambda: main(["--config-file", CONFIG, *flags, *data])) == 0
    out = capsys.readouterr().out
    assert "check passed in a fresh process: max error" in out
    assert out.count("detections, max error") == 3
    assert "custom_val bbox: AP " in out
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["classes"] == list(shapes.CLASSES)
    assert about["input"]["resize"] == {
        "rule": "shortest_edge",
        "min_size": 96,
        "max_size": 128,
    }
    assert any(image["found"] for image in about["check"]["images"])


@pytest.fixture(scope="module")
def eager(data, weights):
    model = experiment(config.load(CONFIG, data), device="cpu").build_model()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    return model.eval()


@pytest.fixture(scope="module")
def labelled(data, eager, tmp_path_factory):
    """The same pictures, labelled with some of the model's own detections, so that AP is neither 0
    nor 100.
    """
    run = experiment(config.load(CONFIG, data), device="cpu")
    (name,) = run.test_names
    source = Path(next(item for item in data if "val.json=" in item).partition("=")[2])
    content, annotations = json.loads(source.read_text()), []
    for (item,) in run.build_test_loader(name):
        with torch.no_grad():
            found = eager([item])[0]["instances"][::3]
        for box, label in zip(found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()):
            box = [round(box[0]), round(box[1]), round(box[2] - box[0]), round(box[3] - box[1])]
            if min(box[2:]) > 0:
                number = len(annotations) + 1
                one = {"id": number, "image_id": item["image_id"], "category_id": label + 1}
                one |= {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append(one)
    assert [c["id"] for c in content["categories"]] == list(range(1, len(shapes.CLASSES) + 1))
    path = tmp_path_factory.mktemp("labelled") / "labels.json"
    path.write_text(json.dumps({**content, "annotations": annotations}))
    return [f"datasets.val.json={path}" if "val.json=" in item else item for item in data]


def test_evaluation_equals_that_of_the_model(exported, labelled, eager, tmp_path):
    def load_cfg(name):
        return config.load(CONFIG, [*labelled, f"train.output_dir={tmp_path / name}"])

    expected = evaluate_model(experiment(load_cfg("eager"), device="cpu"), eager)
    folder = str(tmp_path / "exported")
    found = evaluate_exported(exported / "model.ts", load_cfg("other"), output_dir=folder)
    assert list(found) == list(expected) == ["custom_val"]
    assert found["custom_val"]["bbox"] == pytest.approx(
        expected["custom_val"]["bbox"], abs=1e-6, nan_ok=True
    )
    assert 1 < expected["custom_val"]["bbox"]["AP"] < 99
    files = [next((tmp_path / name).rglob("*instances*.json")) for name in ("eager", "exported")]
    predictions = [json.loads(path.read_text()) for path in files]
    assert len(predictions[0]) == len(predictions[1]) > 20
    for a, b in zip(*predictions):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert b["score"] == pytest.approx(a["score"], abs=1e-4)
        assert b["bbox"] == pytest.approx(a["bbox"], abs=1e-3)


def test_failed_check_is_exit_code_1(main, data, weights, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise CheckError("largest error 1 on an image")

    monkeypatch.setattr(pipeline_module, "verify", fail)
    flags = ["--weights", weights, "--output", str(tmp_path / "out")]
    assert run_tool(lambda: main(["--config-file", CONFIG, *flags, *data])) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("check failed: largest error 1 on an image; nothing was written")
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "torchscrip"], "did you mean 'torchscript'?"),
        (["--format", "onnx", "--method", "script"], "leave it out with --format onnx"),
        (["--method", "jit"], "method 'jit', expected one of trace, script"),
        (["--sample-image", "nowhere.jpg"], "--sample-image nowhere.jpg does not exist"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_mistakes_are_one_line(main, data, tmp_path, capsys, flags, message):
    command = ["--config-file", CONFIG, "--output", str(tmp_path / "out"), *flags, *data]
    assert run_tool(lambda: main(command)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "out" / "model.ts").exists()


def test_moved_files_still_load(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "elsewhere")
    outputs = load(tmp_path / "elsewhere" / "model.ts").run(picture(96, 110))
    assert set(outputs) == {"boxes", "scores", "classes"}
