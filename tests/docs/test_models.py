"""The table to pick a model from: it is that of the models as they are, and its costs are right."""

import json
import re

import pytest
import torch

from d2dense import config, costs, model_table, model_zoo
from tests.docs.pages import ROOT
from tests.projects.parity import on_meta
from tools import model_table as command

TABLE = {
    each["model"]: each for each in json.loads((ROOT / "docs/models.json").read_text())["rows"]
}
ENTRIES = model_table.entries()


def test_the_table_has_the_models_that_projects_name():
    assert list(TABLE) == list(ENTRIES)
    assert set(TABLE) <= set(model_zoo.list_models())
    assert {name.split("/")[0] for name in TABLE} == {"CEDNet", "CoDETR", "FSCascade", "HFGD"}


@pytest.mark.parametrize("name", TABLE)
def test_its_parameters_are_the_models(name):
    used, whole = model_table.parameters(on_meta(name))
    assert TABLE[name]["params M"] == round(used / 1e6, 2)
    assert TABLE[name]["in training"] == round(whole / 1e6, 2)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_verified_is_in_a_test(name):
    test = ROOT / ENTRIES[name]["tests"]
    assert "def test_" in test.read_text()
    assert TABLE[name]["verified"] == ENTRIES[name]["verified"]


def test_the_readme_says_the_same():
    rows = re.findall(r"^\| `(\w+/\w+)` \| (\S+) \| (\S+) at ([^|]+) \| ([^|]+) \|$",
                      (ROOT / "README.md").read_text(), re.M)  # fmt: skip
    assert len(rows) > 7
    for name, *shown in rows:
        keys = ("params M", "GMACs", "at", "paper")
        assert shown == [str(TABLE[name][key]) for key in keys], name


@pytest.mark.parametrize(
    "name", ["CoDETR/co_dino_tiny_shapes", "FSCascade/fscascade_mask_tiny_shapes"]
)
def test_costs_without_the_work_are_those_with_it(name):
    model = config.build_model(model_zoo.get_config(name), device="cpu").eval()
    image = costs.detection_input(96, 128)
    expected = costs.count_macs(model, image)
    with model_table.hollow():
        assert costs.count_macs(model, image) == expected
        assert not (torch.ones(2, 3) @ torch.ones(3, 2)).any()


def test_the_command_writes_what_is_known(tmp_path, monkeypatch):
    """One small model, and a report of ``make bench`` in which it is."""
    name = "HFGD/hfgd_tiny_shapes"
    entry = {"size": [64, 64], "verified": "nothing", "paper": {
        "metric": "mIoU", "value": 50.5, "data": "somewhere", "where": "Table 1"}}  # fmt: skip
    monkeypatch.setattr(model_table, "entries", lambda: {name: entry})
    rows = {"Summary": [{"model": name, "ms": 12.5}, {"model": "timm resnet50", "ms": None}]}
    (tmp_path / "machine_here.json").write_text(json.dumps({"rows": rows}))
    argv = ["--output", str(tmp_path / "models"), "--benchmarks", str(tmp_path)]
    command.main(argv)
    (found,) = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert found["paper"] == "mIoU 50.5 (somewhere, Table 1)"
    assert found["ms, machine_here"] == "12"
    model = config.build_model(model_zoo.get_config(name), device="cpu")
    report = costs.analyze(model, tasks=["params", "flops"], input_size=(64, 64))
    assert found["params M"] == round(report["params"] / 1e6, 2)
    assert found["in training"] == round(report["params_training"] / 1e6, 2)
    assert found["GMACs"] == round(report["macs"] / 1e9, 1)
    # costs that are known are kept, unless asked for
    text = (tmp_path / "models.json").read_text()
    (tmp_path / "models.json").write_text(
        text.replace(f'"GMACs": {found["GMACs"]}', '"GMACs": 7.5')
    )
    command.main(argv)
    assert json.loads((tmp_path / "models.json").read_text())["rows"][0]["GMACs"] == 7.5
    command.main([*argv, "--recount"])
    again = json.loads((tmp_path / "models.json").read_text())["rows"][0]
    assert again["GMACs"] == found["GMACs"]
