"""The analyses' commands: the paper's fusion times, and runs on the generated shapes."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch

from d2dense import config, model_zoo
from d2dense.data import shapes
from d2dense.errors import run_tool

CEDNET = "CEDNet/retinanet_cednet_tiny_shapes"
FASTER = "FSCascade/faster_rcnn_tiny_shapes"
MASKS = "FSCascade/fscascade_mask_tiny_shapes"


@pytest.fixture(scope="module")
def tools(repo_root):
    def load(name):
        path = repo_root / "projects/CEDNet/tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"cednet_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return {name: load(name) for name in ("input_gradients", "quality_scores", "fusion_time")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """``--json`` and ``--images`` of eight generated pictures."""
    root = tmp_path_factory.mktemp("shapes")
    shapes.generate(output_dir=root, split="val", count=8, size=96, seed=0)
    annotations = root / "annotations" / "instances_val.json"
    return ["--json", str(annotations), "--images", str(root / "images" / "val")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of untrained weights for each of the models."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name in (CEDNET, FASTER, MASKS):
        torch.manual_seed(0)
        files[name] = str(folder / f"{name.replace('/', '_')}.pth")
        torch.save({"model": model_zoo.get_model(name).state_dict()}, files[name])
    return files


def models(weights, *names):
    return [word for name in names for word in ("--config-file", name, "--weights", weights[name])]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------ fusion time


def test_fusion_times_of_the_paper(tools, tmp_path):
    """Section 3 of the paper: 32.0, 24.5, 24.7 and 91.7 % (and 2.7 % for HRNet)."""
    names = {
        "CEDNet/retinanet_cednet_next_t": 32.0,
        "CEDNet/retinanet_cednet_next_s": 24.5,
        "CEDNet/retinanet_cednet_next_b": 24.7,
        "CEDNet/retinanet_convnext_s_fpn": 91.7,
    }
    flags = [word for name in names for word in ("--config-file", name)]
    assert tools["fusion_time"].main([*flags, "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "fusion_time.csv")
    assert [round(float(row["percent"]), 1) for row in rows] == list(names.values())
    assert rows[0]["parameters"] == "32172160"
    assert [row["model"] for row in rows] == [name.split("/")[1] for name in names]
    assert is_picture(tmp_path / "fusion_time.png")


def test_both_kinds_of_config_have_one_fusion_time(tools, tmp_path):
    files = [str(model_zoo.get_config_file(CEDNET, kind)) for kind in ("lazy", "yaml")]
    flags = [w for file in files for w in ("--config-file", file)]
    flags += ["--name", "lazy", "--name", "yaml"]
    assert tools["fusion_time"].main([*flags, "--output", str(tmp_path)]) == 0
    lazy, yaml = read(tmp_path / "fusion_time.csv")
    assert {**lazy, "model": ""} == {**yaml, "model": ""}


def test_what_fuses_nothing_is_one_line(tools, tmp_path, capsys):
    command = ["--config-file", CEDNET, "--output", str(tmp_path)]
    alone = ["model.backbone.trunk.num_stages=1"]
    assert run_tool(lambda: tools["fusion_time"].main([*command, *alone])) == 2
    assert "one stage without decoder" in capsys.readouterr().err
    twice = ["--config-file", CEDNET]
    assert run_tool(lambda: tools["fusion_time"].main([*command, *twice])) == 2
    assert "tell them apart by --name" in capsys.readouterr().err


# ------------------------------------------------ input gradients


def test_input_gradients_of_three_kinds_of_detectors(tools, data, weights, tmp_path):
    command = [*models(weights, CEDNET, FASTER, MASKS), *data, "--device", "cpu"]
    command += ["--num", "3", "--pictures", "1", "--arrays", "--steps", "50"]
    assert tools["input_gradients"].main([*command, "--output", str(tmp_path)]) == 0
    names = [name.split("/")[1] for name in (CEDNET, FASTER, MASKS)]
    maps = [np.load(path) for path in sorted((tmp_path / "maps").glob("*.npz"))]
    assert len(maps) == 3
    assert sum(is_picture(path) for path in (tmp_path / "maps").glob("*.png")) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    largest = max(each[name].max() for each in maps for name in names)
    assert summary["largest_gradient"] == pytest.approx(largest)
    for kind in ("areas", "areas_relative"):
        assert is_picture(tmp_path / f"{kind}.png")
        rows = read(tmp_path / f"{kind}.csv")
        for row in rows[:: len(rows) // 10]:
            t = float(row["t"])
            for name in names:
                scale = [each[name].max() if "relative" in kind else largest for each in maps]
                # thresholds are printed with six digits
                low, high = (
                    np.mean([(m[name] / s > t * f).mean() for m, s in zip(maps, scale)])
                    for f in (1 + 1e-5, 1 - 1e-5)
                )
                assert low - 1e-7 <= float(row[name]) <= high + 1e-7
    for name in names:
        common = np.mean([each[name].mean() for each in maps]) / largest
        own = np.mean([each[name].mean() / each[name].max() for each in maps])
        assert summary["area_under"]["common"][name] == pytest.approx(common)
        assert summary["area_under"]["relative"][name] == pytest.approx(own)
    row = read(tmp_path / "images.csv")[1]
    assert float(row[f"{names[0]}: loss"]) > 0
    expected = maps[1][names[0]].max()
    assert float(row[f"{names[0]}: largest_gradient"]) == pytest.approx(expected, rel=1e-5)


def test_a_yaml_config_gives_the_same_maps(tools, data, weights, tmp_path):
    for kind in ("lazy", "yaml"):
        path = str(model_zoo.get_config_file(CEDNET, kind))
        command = ["--config-file", path, "--weights", weights[CEDNET], *data, "--num", "1"]
        command += ["--pictures", "0", "--output", str(tmp_path / kind), "--device", "cpu"]
        assert tools["input_gradients"].main(command) == 0
    tables = [(tmp_path / kind / "images.csv").read_text() for kind in ("lazy", "yaml")]
    assert tables[0] == tables[1]


# ------------------------------------------------ quality scores


@pytest.fixture(scope="module")
def compared(tools, data, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("quality")
    command = [*models(weights, CEDNET, FASTER), *data, "--keep", "3", "--panels", "1"]
    # untrained, they are not confident
    low = ["--any-class", "--device", "cpu", "--output", str(output)]
    assert tools["quality_scores"].main([*command, *low]) == 0
    return output


def test_quality_scores_rank_the_images(compared):
    rows = read(compared / "scores.csv")
    differences = [float(row["difference"]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert [int(row["kept"]) for row in rows] == [1] * 3 + [0] * (len(rows) - 3)
    for row in rows:
        ours, theirs = (float(row[f"score: {name.split('/')[1]}"]) for name in (CEDNET, FASTER))
        assert min(ours, theirs) >= 0
        assert float(row["difference"]) == pytest.approx(ours - theirs, abs=2e-6)
    assert any(float(row["score: faster_rcnn_tiny_shapes"]) > 0 for row in rows)
    assert is_picture(compared / "scores.png")
    (panel,) = (compared / "panels").iterdir()
    assert is_picture(panel)


def test_a_ranking_chooses_the_images_of_gradients(tools, data, weights, compared, tmp_path):
    command = [*models(weights, CEDNET), *data, "--ranking", str(compared / "scores.csv")]
    command += ["--num", "2", "--pictures", "0", "--device", "cpu", "--output", str(tmp_path)]
    assert tools["input_gradients"].main(command) == 0
    best = [row["image_id"] for row in read(compared / "scores.csv")[:2]]
    assert [row["image_id"] for row in read(tmp_path / "images.csv")] == best


def test_prediction_files_in_place_of_models(tools, data, tmp_path):
    """The model finds every object of every second image; the baseline finds nothing."""
    with open(data[1]) as file:
        truth = json.load(file)
    good = sorted({a["image_id"] for a in truth["annotations"]})[::2]
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.8,
        }
        for a in truth["annotations"]
        if a["image_id"] in good
    ]
    for name, rows in (("a", perfect), ("b", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    command = ["--predictions", *files, "--name", "a", "--name", "b", *data, "--panels", "1"]
    assert tools["quality_scores"].main([*command, "--output", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out" / "scores.csv")
    expected = [0.8] * len(good) + [0.0] * (len(rows) - len(good))
    assert [float(row["score: a"]) for row in rows] == pytest.approx(expected)
    assert [int(row["image_id"]) for row in rows[: len(good)]] == good
    assert {row["score: b"] for row in rows} == {"0.000000"}


# ------------------------------------------------ mistakes and real images


def test_mistakes_are_one_line(tools, data, weights, tmp_path, capsys):
    out = ["--output", str(tmp_path)]
    one = ["--config-file", CEDNET]
    known = [*one, "--weights", weights[CEDNET]]
    for tool, command, message in [
        ("input_gradients", [*one, *data], "trained weights are needed, give --weights"),
        ("input_gradients", [*known, "--weights", "b", *data], "--weights is given 2 times for 1"),
        ("input_gradients", [*known, *data[:2]], "--json and --images belong together"),
        ("input_gradients", [*known, *data, "--num", "0"], "--num: '0' is not"),
        ("input_gradients", [*known, *data, "--ranking", "none.csv"], "cannot be read"),
        ("input_gradients", [*known, "--dataset", "nowhere"], "nowhere"),
        ("quality_scores", [*known, *data], "--config-file is given 1 times, expected 2"),
        ("quality_scores", ["--predictions", "a", "b"], "--predictions need --dataset"),
        ("quality_scores", ["--predictions", "a", "b", *data], "predictions a cannot be read"),
        ("quality_scores", [*known, "--predictions", "a", "b"], "take the place of --config-file"),
        ("fusion_time", ["--config-file", "CEDNet/none"], "neither a file nor a model-zoo name"),
    ]:
        assert run_tool(lambda c=command, t=tool: tools[t].main([*c, *out])) == 2
        captured = capsys.readouterr().err.strip().splitlines()
        assert message in captured[-1]
        assert captured[-1].startswith("error: ")


def test_real_images(tools, shared_data, tmp_path):
    """On a set with other classes: their number comes from the data."""
    folder = shared_data / "fruits_nuts"
    annotations = folder / "annotations" / "instances_val.json"
    if not annotations.is_file():
        pytest.skip(f"no {annotations}")
    count = len(json.loads(annotations.read_text())["categories"])
    command = []
    for path, key in ((CEDNET, "num_classes"), (FASTER, "roi_heads.num_classes")):
        model = config.build_model(config.load(path, [f"model.{key}={count}"]), device="cpu")
        file = str(tmp_path / f"{key}.pth")
        torch.save({"model": model.state_dict()}, file)
        command += ["--config-file", path, "--weights", file]
    command += ["--json", str(annotations), "--images", str(folder / "images" / "val")]
    command += ["--num", "2", "--pictures", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert tools["input_gradients"].main([*command, "train.class_count=auto"]) == 0
    assert len(read(tmp_path / "images.csv")) == 2
