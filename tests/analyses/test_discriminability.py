"""Score maps and IoF-IoB curves against loops over pixels and worked examples."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from d2dense.analyses.discriminability import (
    ForegroundCurve,
    Levels,
    encoder_levels,
    foreground,
    score_map,
)
from d2dense.errors import UserError, run_tool
from tests.analyses.tiny import DETR, RETINANET, build, sample

FASTER = "FSCascade/faster_rcnn_tiny_shapes"


def at(image, y, x):
    """The value between pixels, which are squares of side 1; beyond the border the nearest."""
    height, width = image.shape
    total = 0.0
    for i in (int(np.floor(y - 0.5)), int(np.floor(y - 0.5)) + 1):
        for j in (int(np.floor(x - 0.5)), int(np.floor(x - 0.5)) + 1):
            weight = (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j))
            total += weight * image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
    return total


def test_score_map_against_loops_over_pixels():
    rng = np.random.default_rng(0)
    padded, size = (8, 12), (7, 9)
    maps = [rng.normal(size=(5, 4, 6)), rng.normal(size=(3, 2, 3))]
    maps[0][:, 3, 5] = 100  # in the padding: it is no maximum of the image
    expected = np.zeros(size)
    for level in maps:
        norm = np.sqrt((level**2).sum(axis=0))
        resized = np.zeros(size)
        for y, x in np.ndindex(*size):
            scale = (norm.shape[0] / padded[0], norm.shape[1] / padded[1])
            resized[y, x] = at(norm, (y + 0.5) * scale[0], (x + 0.5) * scale[1])
        expected += resized / resized.max() / len(maps)
    found = score_map(Levels([torch.tensor(level) for level in maps], padded, size))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_level_of_zeros_adds_nothing():
    one = torch.zeros(2, 4, 4)
    one[0, 1, 1] = 3
    both = score_map(Levels([one, torch.zeros(2, 2, 2)], (4, 4), (4, 4)))
    assert float(both[1, 1]) == 0.5
    assert float(both.sum()) == 0.5


def test_foreground_against_loops_over_pixels():
    boxes = torch.tensor([[1.0, 2, 4, 6], [3.4, 0, 7.6, 3.5], [5, 5, 5, 8]])
    found = foreground(boxes, (9, 10))
    for y, x in np.ndindex(9, 10):
        inside = any(x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes.tolist())
        assert bool(found[y, x]) == inside
    assert not foreground(torch.zeros(0, 4), (3, 3)).any()


def test_worked_example_of_two_images():
    """Shares above 0, 1/4, 1/2, 3/4 and 1, of foreground and background."""
    curve = ForegroundCurve(torch.linspace(0, 1, 5).double())
    inside = torch.tensor([[True, True, False, False]])
    curve.add(torch.tensor([[1.0, 0.5, 0.5, 0.1]]), inside)
    assert curve.iof.tolist() == [1, 1, 0.5, 0.5, 0]
    assert curve.iob.tolist() == [1, 0.5, 0, 0, 0]
    curve.add(torch.tensor([[0.2, 0.2, 0.9, 0.0]]), inside)
    assert curve.iof.tolist() == [1, 0.5, 0.25, 0.25, 0]
    assert curve.iob.tolist() == [0.75, 0.5, 0.25, 0.25, 0]
    # corners (0, 0), (1/4, 1/4), (1/2, 1/2), (3/4, 1), (1, 1) of IoB and IoF
    assert curve.area_under == pytest.approx(1 / 32 + 3 / 32 + 3 / 16 + 1 / 4)


def test_an_image_without_background_counts_for_the_foreground_only():
    curve = ForegroundCurve(torch.linspace(0, 1, 3).double())
    curve.add(torch.tensor([[0.6, 0.0]]), torch.tensor([[True, False]]))
    curve.add(torch.tensor([[0.6, 0.0]]), torch.tensor([[True, True]]))
    assert curve.iof.tolist() == [0.75, 0.75, 0]
    assert curve.iob.tolist() == [0, 0, 0]


def test_area_of_perfect_of_blind_and_of_reversed_scores():
    inside = torch.rand(20, 20) < 0.3
    scores = torch.rand(20, 20) * 0.9 + 0.05
    normalised = 1 - 1e-3 * (1 - scores)  # as of features that a norm has made equally long
    areas = []
    for each in (inside.float(), torch.full((20, 20), 0.5), (~inside).float(), scores, normalised):
        curve = ForegroundCurve()
        curve.add(each, inside)
        areas.append(curve.area_under)
    assert areas[0] == 1
    assert areas[1] == 0.5
    assert areas[2] == 0
    # the chance that a pixel of an object has the larger score
    pairs = (scores[inside][:, None] > scores[~inside]).double().mean()
    assert areas[3] == pytest.approx(float(pairs), abs=5e-3)
    assert areas[4] == pytest.approx(float(pairs), abs=1e-2)


@pytest.mark.parametrize("name", [RETINANET, FASTER])
def test_levels_of_a_pyramid_are_those_of_the_head(name):
    model = build(name)
    levels = encoder_levels(model, sample())
    images = model.preprocess_image([sample()])
    maps = model.backbone(images.tensor)
    names = {RETINANET: ["p3", "p4", "p5", "p6", "p7"], FASTER: ["p2", "p3", "p4", "p5"]}
    assert levels.padded == tuple(images.tensor.shape[2:])
    assert levels.size == (75, 90)
    for found, key in zip(levels.maps, names[name], strict=True):
        assert torch.equal(found, maps[key][0])
    assert not model.backbone._forward_hooks


def test_levels_of_a_transformer_are_its_memory():
    model = build(DETR)
    levels = encoder_levels(model, sample())
    memory = model.encode(model.preprocess([sample()]))
    assert levels.padded == (96, 96)
    assert [tuple(each.shape) for each in levels.maps] == [
        (32, 12, 12),
        (32, 6, 6),
        (32, 3, 3),
        (32, 2, 2),
    ]
    # row 4, column 2 of the second level
    assert torch.equal(levels.maps[1][:, 4, 2], memory.tokens[0, 144 + 4 * 6 + 2])
    assert not model.encoder._forward_hooks


def test_what_is_no_detector():
    with pytest.raises(UserError, match="Linear has no Detectron2 backbone"):
        encoder_levels(nn.Linear(1, 1), sample())


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_on_two_kinds_of_detectors(codetr_tool, shapes_data, save_weights, tmp_path):
    command = [*shapes_data, "--device", "cpu", "--num", "2", "--pictures", "1"]
    for name in (DETR, RETINANET):
        command += ["--config-file", name, "--weights", save_weights(name)]
    assert codetr_tool("discriminability")([*command, "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "iof_iob.csv")
    thresholds = [float(row["S"]) for row in rows]
    assert thresholds == sorted(thresholds)
    assert (thresholds[0], thresholds[-1]) == (0, 1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == 2
    for name in (DETR, RETINANET):
        short = name.split("/")[1]
        for share in ("IoF", "IoB"):
            column = [float(row[f"{short}: {share}"]) for row in rows]
            assert column == sorted(column, reverse=True)
            assert column[0] > 0.9
            assert column[-1] == 0
        assert 0 < summary["area_under"][short] < 1
    assert Image.open(tmp_path / "iof_iob.png").size[0] > 100
    (picture,) = (tmp_path / "maps").glob("*.png")
    assert Image.open(picture).size[0] > 2 * Image.open(picture).size[1]  # three columns


@pytest.mark.parametrize("source", ["encoder", "cross-attention"])
def test_both_kinds_of_config(codetr_tool, shapes_data, save_weights, both_kinds, tmp_path, source):
    for number, path in enumerate(both_kinds(DETR)):
        command = ["--config-file", path, "--weights", save_weights(DETR), *shapes_data]
        command += ["--device", "cpu", "--num", "1", "--pictures", "0", "--source", source]
        assert (
            codetr_tool("discriminability")([*command, "--output", str(tmp_path / str(number))])
            == 0
        )
    first, second = (tmp_path / str(number) / "iof_iob.csv" for number in (0, 1))
    assert first.read_text() == second.read_text()


def test_attention_of_what_has_none_is_one_line(
    codetr_tool, shapes_data, save_weights, tmp_path, capsys
):
    command = ["--config-file", RETINANET, "--weights", save_weights(RETINANET), *shapes_data]
    command += ["--device", "cpu", "--source", "cross-attention", "--output", str(tmp_path)]
    assert run_tool(lambda: codetr_tool("discriminability")(command)) == 2
    error = capsys.readouterr().err.strip()
    assert "RetinaNet has no queries that objects are matched to" in error
    assert "\n" not in error
