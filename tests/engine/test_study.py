"""Studies: every training once, going on where it stopped, and what the table says."""

from __future__ import annotations

import json

import pytest
import yaml

from d2dense.engine import study as module
from d2dense.engine.study import draw_curves, read_study, run_study, write_table
from d2dense.errors import UserError

CONFIG = "CEDNet/retinanet_cednet_tiny_shapes"
STUDY = {
    "title": "Two of a kind",
    "metric": "bbox/AP",
    "seeds": [1, 2, 3],
    "input_size": [64, 64],
    "datasets": {"shapes": ["train.max_iter=$STEPS"]},
    "models": {
        "A": {"config": CONFIG},
        "B + C": {"config": CONFIG, "overrides": ["model.num_classes=3"]},
    },
}
# stands for a training: AP 10 * seed, + 1 where the classes were changed
TRAIN = """
import json, pathlib, sys
words = sys.argv[1:]
settings = dict(w.split("=", 1) for w in words if "=" in w)
folder, seed = pathlib.Path(settings["train.output_dir"]), int(settings["train.seed"])
with open(folder / "metrics.json", "a") as file:
    for step in (1, 3):
        ap = 10.0 * seed + ("model.num_classes" in settings) + step - 3
        file.write(json.dumps({"iteration": step, "bbox/AP": ap}) + "\\n")
assert "--resume" in words and settings["train.max_iter"] == "4"
if not (folder / "fail").exists():
    (folder / "model_final.pth").touch()
sys.exit((folder / "fail").exists())
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TRAIN", TRAIN)

    def write(values=None, **changes):
        content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content))
        values = {"STEPS": "4"} if values is None else values
        return read_study(path, output=tmp_path / "runs", values=values)

    return write


def test_the_table_holds_mean_and_spread_over_the_seeds(make, tmp_path):
    study = make()
    run_study(study, jobs=2)
    output = tmp_path / "out" / "table.md"
    write_table(study, path=output, command="the command")
    text = output.read_text()
    # 10, 20, 30: mean 20, sample deviation 10
    assert "| 20.0 +- 10.0" in text
    assert "10.0, 20.0, 30.0" in text
    assert "| 21.0 +- 10.0" in text
    assert "11.0, 21.0, 31.0" in text
    assert "the command" in text
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["results"]["shapes"]["B + C"] == {"1": 11.0, "2": 21.0, "3": 31.0}
    a, b = (report["costs"][name]["M parameters"] for name in ("A", "B + C"))
    assert float(a) > float(b)  # fewer classes
    draw_curves(study, output.with_suffix(".png"))
    assert output.with_suffix(".png").stat().st_size > 1000


def test_what_is_finished_is_not_done_again(make, capsys):
    study = make()
    spoiled = study.runs[1].folder
    spoiled.mkdir(parents=True)
    (spoiled / "fail").touch()
    with pytest.raises(UserError, match=r"1 trainings failed, see .*seed2/output.txt"):
        run_study(study)
    (spoiled / "fail").unlink()
    capsys.readouterr()
    run_study(study)
    assert "6 trainings, 1 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "lacks the key 'seeds'"),
        ({"metrics": ["x"]}, "unknown key 'metrics'; did you mean 'metric'"),
        ({"models": {"A": CONFIG}}, "model 'A' .* needs 'config: NAME_OR_PATH'"),
        ({"values": {}}, "needs a value for 'STEPS': add --set STEPS=VALUE"),
    ],
)
def test_mistakes_are_one_line(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_metric_that_was_not_logged_is_named(make, tmp_path):
    study = make(metric="bbox/AP50")
    run_study(study)
    with pytest.raises(UserError, match=r"logged no 'bbox/AP50'; did you mean 'bbox/AP'"):
        write_table(study, path=tmp_path / "table.md", command="")
