"""Artefacts evaluated by the tool, on generated and on real pictures: metrics equal the model's."""

import importlib.util
import json

import pytest
import torch

from d2dense import config
from d2dense.data import shapes
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError, run_tool
from d2dense.export import ImageCheck, comparison, export, pipeline
from d2dense.export.untrained import spread_outputs

DETECTOR, SEGMENTER = "FSCascade/fscascade_tiny_shapes", "HFGD/hfgd_tiny_shapes"


@pytest.fixture(scope="module")
def main(request):
    path = request.config.rootpath / "tools" / "evaluate_exported.py"
    spec = importlib.util.spec_from_file_location("evaluate_exported_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def slots(entries):
    return [f"datasets.{s}.{k}={v}" for s in ("train", "val") for k, v in entries.items()]


def weights_of(name, overrides, path):
    """Save weights whose scores differ from pixel to pixel and from picture to picture."""
    torch.manual_seed(0)
    run = experiment(config.load(name, overrides), device="cpu")
    model = run.build_model().eval()
    item = next(iter(run.build_test_loader(run.test_names[0])))[0]
    torch.save({"model": spread_outputs(model, item["image"]).state_dict()}, path)
    return str(path)


def label_with_detections(name, overrides, weights, source, target):
    """Write annotations for AP between 0 and 100: some of the model's own detections."""
    run = experiment(config.load(name, overrides), device="cpu")
    model = run.build_model().eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    content = json.loads(source.read_text())
    ids = sorted(category["id"] for category in content["categories"])
    annotations = []
    for (item,) in run.build_test_loader(run.test_names[0]):
        with torch.no_grad():
            found = model([item])[0]["instances"][:40:3]
        for (x0, y0, x1, y1), label in zip(
            found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()
        ):
            box = [round(x0), round(y0), round(x1 - x0), round(y1 - y0)]
            if min(box[2:]) > 0:
                one = {"id": len(annotations) + 1, "image_id": item["image_id"], "bbox": box}
                one |= {"category_id": ids[label], "area": box[2] * box[3], "iscrowd": 0}
                annotations.append(one)
    assert len(annotations) > 5
    target.write_text(json.dumps({**content, "annotations": annotations}))


def detector(source, images, folder):
    """Return a detector on pictures that are labelled with its own detections."""
    mapper = "dataloader.test.mapper.augmentations"
    fixed = [f"{mapper}.min_size=[96]", f"{mapper}.max_size=128", "train.class_count=auto"]
    own = [*fixed, *slots({"json": source, "images": images})]
    weights = weights_of(DETECTOR, own, folder / "detector.pth")
    label_with_detections(DETECTOR, own, weights, source, folder / "labels.json")
    overrides = [*fixed, *slots({"json": folder / "labels.json", "images": images})]
    return DETECTOR, overrides, weights, ("bbox", "AP")


def segmenter(entries, folder, *changes):
    overrides = [*changes, "train.class_count=auto", *slots({"kind": "sem_seg", **entries})]
    overrides.append("dataloader.test.mapper.augmentations.min_size=[65]")
    weights = weights_of(SEGMENTER, overrides, folder / "segmenter.pth")
    return SEGMENTER, overrides, weights, ("sem_seg", "mIoU")


def generated_detector(folder, _):
    shapes.generate(output_dir=folder, split="val", count=4, size=96, seed=5)
    source = folder / "annotations" / "instances_val.json"
    return detector(source, folder / "images" / "val", folder)


def generated_segmenter(folder, _):
    shapes.generate(output_dir=folder, split="val", count=3, size=(90, 101), seed=5)
    entries = {"images": folder / "images" / "val", "labels": folder / "semantic_val"}
    (folder / "classes.json").write_text(json.dumps(list(shapes.SEMANTIC_CLASSES)))
    return segmenter(entries | {"classes": folder / "classes.json"}, folder)


def real_detector(folder, shared_data):
    root = shared_data() / "nuclei_mini"
    return detector(root / "annotations/instances_val.json", root / "images/val", folder)


def real_segmenter_in_windows(folder, shared_data):
    root = shared_data() / "camvid_mini"
    entries = {"images": root / "images/val", "labels": root / "labels/val"}
    names = sorted(path.stem for path in (root / "images/val").iterdir())[:4]
    (folder / "split.txt").write_text("\n".join(names))
    entries |= {"split": folder / "split.txt"}
    windows = ["model.inference.window=[49,49]", "model.inference.stride=[41,41]"]
    windows.append("model.inference.pad_step=8")
    return segmenter(entries | {"classes": root / "classes.json"}, folder, *windows)


# Every way of exporting sees generated and real pictures, a detector and a segmenter.
CASES = [
    (generated_detector, "torchscript", "script"),
    (generated_segmenter, "torchscript", "trace"),
    (real_detector, "torchscript", "trace"),
    (real_segmenter_in_windows, "torchscript", "script"),
    (generated_segmenter, "torch_export", "trace"),
    pytest.param(real_detector, "torch_export", "trace", marks=pytest.mark.long),
    pytest.param(generated_detector, "onnx", "trace", marks=pytest.mark.long),
    (real_segmenter_in_windows, "onnx", "trace"),
]


@pytest.mark.parametrize(
    ("case", "format", "method"),
    CASES,
    ids=lambda value: getattr(value, "__name__", value),
)
def test_file_equals_model(main, request, monkeypatch, tmp_path, capsys, case, format, method):
    # the metrics are the check here
    checked = ImageCheck(height=1, width=1, found=1, error=0.0)
    monkeypatch.setattr(pipeline, "verify", lambda *args, **kwargs: [checked])
    name, overrides, weights, (task, metric) = case(
        tmp_path, lambda: request.getfixturevalue("shared_data")
    )
    settings = {"overrides": overrides, "weights": weights, "format": format, "method": method}
    done = export(name, output_dir=tmp_path / "exported", **settings)
    command = ["--model", str(done.path), "--config-file", name, "--compare"]
    command += ["--weights", weights, "--output", str(tmp_path / "out"), *overrides]
    assert run_tool(lambda: main(command)) == 0
    assert "largest difference of any metric: " in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["file"].keys() == results["model"].keys() == {"custom_val"}
    assert comparison.largest_difference(results["file"], results["model"])[0] < 1e-3
    assert 0 < results["file"]["custom_val"][task][metric] < 99
    predictions = [sorted((tmp_path / "out" / each).rglob("*.json")) for each in ("file", "model")]
    assert [path.name for path in predictions[0]] == [path.name for path in predictions[1]] != []


def test_differences_of_metrics():
    nan = float("nan")
    found = {"val": {"bbox": {"AP": 41.25, "AP-cat": 3.0, "AP-dog": nan}}}
    expected = {"val": {"bbox": {"AP": 41.0, "AP-cat": 3.5, "AP-dog": nan}}}
    assert comparison.largest_difference(found, expected) == (0.5, "val/bbox/AP-cat")
    assert comparison.largest_difference(found, found) == (0.0, "")
    table = comparison.metric_table(found, expected)
    assert "AP-cat" not in table
    assert "41.250 |  41.000 |        0.250" in table
    only_one = {"val": {"bbox": {"AP": nan, "AP-cat": 3.5, "AP-dog": nan}}}
    assert comparison.largest_difference(found, only_one) == (float("inf"), "val/bbox/AP")
    with pytest.raises(UserError, match="only one of them has val/segm/AP"):
        comparison.largest_difference(found, {"val": {**found["val"], "segm": {"AP": 1.0}}})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "w.pth"], "--weights is for --compare"),
        ([], "nowhere.json does not exist"),
        (["train.test_aug.enabled=true"], "a file sees each image once"),
    ],
)
def test_mistakes_are_one_line(main, capsys, flags, message):
    command = ["--model", "nowhere.ts", "--config-file", DETECTOR, *flags]
    assert run_tool(lambda: main(command)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
