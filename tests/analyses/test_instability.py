"""Matching instability: worked examples, and matches against all permutations."""

import csv
import itertools
import json
import shutil

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, generalized_box_iou

from d2dense.analyses.instability import changes, instability_report
from d2dense.analyses.matching import match
from d2dense.errors import UserError, run_tool
from tests.analyses.tiny import DETR, RETINANET, build, sample


def test_worked_example():
    """In the first image two queries swap their objects and one loses its, in the second none."""
    before = [torch.tensor([0, 1, 2, -1, -1]), torch.tensor([-1, 0, -1, -1, -1])]
    after = [torch.tensor([1, 0, -1, -1, -1]), torch.tensor([-1, 0, -1, -1, -1])]
    assert changes(before, after) == 1.5
    assert changes(after, before) == 1.5
    assert changes(before, before) == 0
    moved = [before[0], torch.tensor([0, -1, -1, -1, -1])]  # to another query: both changed
    assert changes(before, moved) == 1


def test_checkpoints_of_different_models():
    with pytest.raises(UserError, match="two checkpoints have 2 and 3 queries"):
        changes([torch.zeros(2)], [torch.zeros(3)])


def test_matches_are_the_cheapest_of_all():
    model, example = build(DETR), sample()
    with torch.no_grad():
        logits, boxes = model.decode(model.encode(model.preprocess([example])))
    p = logits[-1, 0].sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    scale = torch.tensor([90.0, 75, 90, 75])
    truth = example["instances"].gt_boxes.tensor
    relative = box_convert(truth / scale, "xyxy", "cxcywh")
    corners = box_convert(boxes[-1, 0], "cxcywh", "xyxy") * scale
    cost = (
        2 * focal[:, example["instances"].gt_classes]
        + 5 * (boxes[-1, 0][:, None] - relative).abs().sum(-1)
        - 2 * generalized_box_iou(corners, truth)
    )
    pairs = itertools.permutations(range(50), 2)
    best = min(pairs, key=lambda pair: float(cost[pair[0], 0] + cost[pair[1], 1]))
    expected = torch.full((50,), -1)
    expected[list(best)] = torch.tensor([0, 1])
    assert match(model, example).objects.tolist() == expected.tolist()


def test_more_objects_than_queries():
    model, example = build(DETR), sample()
    instances = example["instances"]
    many = type(instances).cat([instances] * 30)  # 60 objects, 50 queries
    objects = match(model, {**example, "instances": many}).objects
    assert len(set(objects.tolist())) == 50
    assert -1 not in objects.tolist()


def test_no_objects():
    example = sample()
    empty = example["instances"][:0]
    assert (match(build(DETR), {**example, "instances": empty}).objects == -1).all()


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_report_of_two_runs(tmp_path):
    def v(*values):
        return [torch.tensor(values)]

    runs = {
        "steady": {"a.pth": v(0, -1, 1), "b.pth": v(0, -1, 1), "c.pth": v(0, 1, -1)},
        "moving": {"a2.pth": v(0, 1, -1), "b2.pth": v(1, 0, -1), "c2.pth": v(-1, 0, 1)},
    }
    found = instability_report(runs, tmp_path)
    assert found == {"steady": [0, 2], "moving": [2, 2]}
    rows = read(tmp_path / "instability.csv")
    assert [list(row.values()) for row in rows[:2]] == [
        ["steady", "2", "a.pth", "b.pth", "0.000000"],
        ["steady", "3", "b.pth", "c.pth", "2.000000"],
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "images": 1,
        "instability": found,
    }
    assert Image.open(tmp_path / "instability.png").size[0] > 100


def test_the_command(codetr_tool, shapes_data, save_weights, both_kinds, tmp_path):
    """The first two checkpoints are equal; both kinds of config, and the changes by hand."""
    files = [save_weights(DETR, seed) for seed in (0, 0, 1)]
    twin = tmp_path / "twin.pth"
    shutil.copyfile(files[0], twin)
    files[1] = str(twin)
    command = [*shapes_data, "--device", "cpu", "--num", "3", "--name", "lazy", "--name", "yaml"]
    for path in both_kinds(DETR):
        command += ["--config-file", path, "--weights", *files]
    assert codetr_tool("instability")([*command, "--output", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out" / "instability.csv")
    assert [(row["model"], row["checkpoint"]) for row in rows] == [
        (model, k) for model in ("lazy", "yaml") for k in ("2", "3")
    ]
    values = [float(row["instability"]) for row in rows]
    assert values[0] == values[2] == 0
    assert values[1] == values[3] > 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        (DETR, 1, "--weights has only"),
        (RETINANET, 2, "RetinaNet has no queries that objects are matched to"),
    ],
)
def test_mistakes_are_one_line(
    codetr_tool, shapes_data, save_weights, tmp_path, capsys, name, count, message
):
    files = [save_weights(name, seed) for seed in range(count)]
    command = ["--config-file", name, "--weights", *files, *shapes_data, "--device", "cpu"]
    assert run_tool(lambda: codetr_tool("instability")([*command, "--output", str(tmp_path)])) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_same_checkpoint_twice(codetr_tool, save_weights, tmp_path, capsys):
    file = save_weights(DETR)
    command = ["--config-file", DETR, "--weights", file, file, "--output", str(tmp_path)]
    assert run_tool(lambda: codetr_tool("instability")(command)) == 2
    assert "names a checkpoint twice" in capsys.readouterr().err
