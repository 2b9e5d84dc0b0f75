"""Mistakes that a run must find before its first step: one line, exit code 2, nothing trained."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from d2dense import checkpoint, config
from d2dense.data import datasets
from d2dense.engine import checks
from d2dense.engine.experiment import experiment
from d2dense.engine.train_net import main
from d2dense.errors import UserError, run_tool


@pytest.fixture
def own_set(coco_set, tmp_path):
    """A copy of the tiny data that a test may spoil; ``train`` stays whole."""
    folder = tmp_path / "val"
    shutil.copytree(coco_set.images, folder)
    return folder


def override(kind, folder, *more):
    slot = {"yaml": "DATASETS.CUSTOM.VAL.", "lazy": "datasets.val."}[kind]
    names = ("JSON", "IMAGES") if kind == "yaml" else ("json", "images")
    return [slot + names[0], f"{folder}/instances.json", slot + names[1], str(folder), *more]


def fails(capfd, configs, kind, overrides):
    """Run and return the line on stderr; no step may have been taken."""
    code = run_tool(lambda: main(["--config-file", configs[kind], *overrides]))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    output = Path(configs[kind]).parent / f"out_{kind}"
    assert not list(output.glob("*.pth"))
    assert not (output / "metrics.json").exists() or not (output / "metrics.json").read_text()
    return lines[0]


KINDS = ("yaml", "lazy")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_pictures_of_the_test_set(configs, own_set, capfd, kind):
    (own_set / "5.png").unlink()
    line = fails(capfd, configs, kind, override(kind, own_set))
    assert f"{own_set}/5.png does not exist" in line
    assert "custom_val" in line
    assert "datasets.<slot>.images" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_set_that_cannot_be_read(configs, own_set, capfd, kind):
    content = json.loads((own_set / "instances.json").read_text())
    content["annotations"][0]["bbox"][2] = float("nan")
    (own_set / "instances.json").write_text(json.dumps(content))
    line = fails(capfd, configs, kind, override(kind, own_set))
    assert "instances.json" in line


def test_a_missing_annotation_file(configs, own_set, capfd):
    (own_set / "instances.json").unlink()
    assert "does not exist" in fails(capfd, configs, "yaml", override("yaml", own_set))


def test_other_classes_in_the_test_set(configs, own_set, capfd):
    content = json.loads((own_set / "instances.json").read_text())
    content["categories"][2]["name"] = "other"
    (own_set / "instances.json").write_text(json.dumps(content))
    assert "different classes" in fails(capfd, configs, "lazy", override("lazy", own_set))


@pytest.mark.parametrize(
    ("metric", "test", "message"),
    [
        ("bbox/AP50", ("custom_val", "custom_train"), "begin it with one of custom_val/, custom_"),
        ("custom_val/bbox/AP50", ("custom_val",), "leave out 'custom_val/'"),
        ("bbox/AP50", (), "needs a test set"),
    ],
)
def test_a_metric_that_no_evaluation_can_have(metric, test, message):
    with pytest.raises(UserError, match=message):
        checks._check_metric(metric, test)


def test_metrics_that_an_evaluation_may_have():
    checks._check_metric("", ())
    checks._check_metric("bbox/AP50", ("bbox",))
    checks._check_metric("custom_b/bbox/AP", ("custom_a", "custom_b"))


def test_a_metric_without_its_test_set_ends_the_run_before_it_starts(configs, capfd):
    line = fails(capfd, configs, "yaml", ["TEST.BEST_METRIC", "custom_val/bbox/AP50"])
    assert "leave out 'custom_val/'" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_that_no_generator_takes(configs, capfd, kind):
    key = "SEED" if kind == "yaml" else "train.seed"
    assert "seed = 2147483648" in fails(capfd, configs, kind, [key, str(2**31)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_count_that_differs_names_its_key(configs, capfd, kind):
    key = "MODEL.ROI_HEADS.NUM_CLASSES" if kind == "yaml" else "model.num_classes"
    line = fails(capfd, configs, kind, [key, "7"])
    assert key in line
    assert "7" in line
    assert "3" in line


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_class_count(configs, own_set, capfd, caplog, tmp_path, kind):
    """An error that names both ways out; with the flag only the predictor starts afresh."""
    exp = experiment(config.load(configs[kind]))
    model = exp.build_model()
    checkpoint.write(tmp_path / "three.pth", {"model": model.state_dict()})
    content = json.loads((own_set / "instances.json").read_text())
    content["categories"].append({"id": 4, "name": "d"})
    (own_set / "instances.json").write_text(json.dumps(content))
    key = "MODEL.WEIGHTS" if kind == "yaml" else "train.init_checkpoint"
    train = [part.replace("VAL", "TRAIN").replace("val.", "train.") for part in override(kind, "")]
    overrides = override(kind, own_set, key, str(tmp_path / "three.pth"))
    for index, value in ((0, f"{own_set}/instances.json"), (2, str(own_set))):
        overrides += [train[index], value]
    line = fails(capfd, configs, kind, overrides)
    for part in ("score.weight", "(3, 8)", "(4, 8)", "REINIT_MISSHAPED", "train.reinit_misshaped"):
        assert part in line, part
    flag = "TRAIN.REINIT_MISSHAPED" if kind == "yaml" else "train.reinit_misshaped"
    caplog.set_level(logging.INFO)
    assert main(["--config-file", configs[kind], *overrides, flag, "True"]) == 0
    text = caplog.text
    assert "score.weight starts afresh" in text
    assert "score.bias starts afresh" in text
    assert "% of its parameters" in text
    assert "stem.weight starts" not in text


def test_a_full_disk_is_warned_of(configs, monkeypatch, caplog):
    exp = experiment(config.load(configs["yaml"]))
    Path(exp.settings.output_dir).mkdir(parents=True, exist_ok=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    caplog.set_level(logging.WARNING)
    checks.check_before_training(exp, exp.build_model())
    assert "CHECKPOINT_KEEP" in caplog.text


def test_a_good_config_passes(configs):
    exp = experiment(config.load(configs["lazy"]))
    Path(exp.settings.output_dir).mkdir(parents=True, exist_ok=True)
    checks.check_before_training(exp, exp.build_model())
    assert len(datasets.load("custom_val")) == 6
