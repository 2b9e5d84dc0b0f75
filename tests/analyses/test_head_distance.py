"""Distances of heads: toys whose maps and divergences are known, and a real detector's heads."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from d2dense.analyses.discriminability import Levels
from d2dense.analyses.head_distance import (
    HeadDistances,
    activation_map,
    best_score,
    distance_report,
    divergence,
    mean_distances,
)
from d2dense.errors import UserError, run_tool
from tests.analyses.tiny import CO_DETR, DETR, build, collaborative, sample


def test_known_divergence():
    first = torch.tensor([[0.25, 0.75]]).double()
    second = torch.tensor([[0.5, 0.5]]).double()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence(first, second) == pytest.approx(expected)
    assert divergence(second, first) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(first, first) == 0


def test_two_linear_heads_on_one_level():
    """The gradient of a linear head is its weight, so the map is what it makes of each pixel."""
    features = torch.tensor(
        [[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 1.0]]], requires_grad=True
    )
    levels = Levels([features.detach()], (2, 2), (2, 2))
    maps = []
    for weights in ([1.0, 0.0], [0.5, -1.0]):
        logits = (torch.tensor(weights)[:, None, None] * features).sum(0).flatten()[:, None]
        (gradient,) = torch.autograd.grad(best_score(logits, 100), features)
        maps.append(activation_map(levels, [gradient]))
    # what the heads see: [1, 0, 0, 2] and [0.5, -3, 0, 0], of which negatives are cut off
    few = 1e-8
    one = np.array([1 + few, few, few, 2 + few]) / (3 + 4 * few)
    two = np.array([0.5 + few, few, few, few]) / (0.5 + 4 * few)
    np.testing.assert_allclose(maps[0].flatten(), one, rtol=1e-6)
    np.testing.assert_allclose(maps[1].flatten(), two, rtol=1e-6)
    distances = HeadDistances(2)
    distances.add(maps)
    expected = [[0, (one * np.log(one / two)).sum()], [(two * np.log(two / one)).sum(), 0]]
    np.testing.assert_allclose(distances.mean, expected, rtol=1e-6)
    both = (expected[0][1] + expected[1][0]) / 2
    np.testing.assert_allclose(mean_distances(distances.mean), [both, both], rtol=1e-6)


def test_score_of_the_best_candidates():
    logits = torch.tensor([[1.0, 5.0], [4.0, 2.0], [-1.0, -3.0]])
    assert float(best_score(logits, 1)) == 5
    assert float(best_score(logits, 2)) == 9
    assert float(best_score(logits, 7)) == 8


def test_levels_are_resized_and_added():
    """Two levels, the image being without the padded row and columns."""
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 2, 3))]
    gradients = [rng.normal(size=each.shape) for each in features]
    expected = np.zeros((7, 9))
    for level, gradient in zip(features, gradients):
        activation = np.zeros(level.shape[1:])
        for channel in range(3):
            activation += gradient[channel].sum() / gradient[channel].size * level[channel]
        activation = torch.tensor(np.maximum(activation, 0))[None, None]
        expected += F.interpolate(activation, (8, 12), mode="bilinear")[0, 0, :7, :9].numpy()
    expected = (expected + 1e-8) / (expected + 1e-8).sum()
    levels = Levels([torch.tensor(each) for each in features], (8, 12), (7, 9))
    found = activation_map(levels, [torch.tensor(each) for each in gradients])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert float(found.sum()) == pytest.approx(1)


def test_mean_over_images_and_over_heads():
    """S_ij and S_i of three heads by loops."""
    rng = np.random.default_rng(1)
    images = [[m / m.sum() for m in rng.random((3, 4, 5)) + 0.1] for _ in range(2)]
    distances = HeadDistances(3)
    for maps in images:
        distances.add([torch.tensor(m) for m in maps])
    expected = np.zeros((3, 3))
    for maps in images:
        for i in range(3):
            for j in range(3):
                for p, q in zip(maps[i].flatten(), maps[j].flatten()):
                    expected[i, j] += p * math.log(p / q) / 2
    np.testing.assert_allclose(distances.mean, expected, atol=1e-12)
    for i, found in enumerate(mean_distances(distances.mean)):
        others = [j for j in range(3) if j != i]
        total = sum(expected[i, j] + expected[j, i] for j in others)
        assert float(found) == pytest.approx(total / (2 * 2))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("auxiliary", [1, 2])
def test_report(tmp_path, auxiliary):
    """Among two auxiliary heads the main head does not count; a single one is compared with it."""
    maps = [torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])]
    names = ["main", "a", "b"][: auxiliary + 1]
    distances = HeadDistances(len(names))
    distances.add(maps[: len(names)])
    found = distance_report(distances, names, tmp_path)
    pair = maps[:2] if auxiliary == 1 else maps[1:]
    expected = (divergence(*pair) + divergence(*pair[::-1])) / 2
    assert found == {name: pytest.approx(expected) for name in names[-2:]}
    rows = read(tmp_path / "head_distance.csv")
    assert [row["head"] for row in rows] == names
    assert float(rows[1]["main"]) == pytest.approx(divergence(maps[1], maps[0]), abs=1e-6)
    assert [bool(row["mean distance"]) for row in rows] == [name in found for name in names]
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 1
    assert Image.open(tmp_path / "head_distance.png").size[0] > 100


HEADS = ("faster_rcnn", "atss", "retinanet", "fcos", "paa", "gfl")


@pytest.fixture(scope="module")
def detector():
    return collaborative(*HEADS)


def test_class_logits_are_what_heads_detect_by(detector):
    """What the class layer of each head says while it detects."""
    from codetr.analyses import class_logits

    example = sample()
    images = detector.preprocess([example])
    with torch.no_grad():
        maps = detector.adapter(detector.encode(images))
    for name, head in zip(HEADS, detector.auxiliary_heads):
        layer = head.classes if hasattr(head, "classes") else None
        if layer is None:  # RetinaNet's layers have Detectron2's names
            (layer,) = (m for n, m in head.named_modules() if n.endswith("cls_score"))
        said = []
        hook = layer.register_forward_hook(lambda *call, said=said: said.append(call[2]))
        head.detect(maps, [(75, 90)])
        hook.remove()
        if name == "faster_rcnn":
            expected = said[0][:, :-1]
        else:
            of_levels = [each.permute(0, 2, 3, 1).reshape(-1, 10) for each in said]
            expected = torch.cat(of_levels)
        found = class_logits(head, maps, [(75, 90)])[0]
        kept = found[found.isfinite().all(dim=1)]
        torch.testing.assert_close(kept, expected[: len(kept)], rtol=1e-5, atol=1e-6, msg=name)
        assert len(kept) > 10


def test_maps_of_a_detector_against_finite_differences(detector):
    """Grad-CAM weighs a channel by the mean of its gradient: by how much the score changes when the
    whole channel is lifted, divided by its number of positions.
    """
    from codetr.analyses import activation_maps, class_logits

    model = collaborative("atss")
    for layer in (model.auxiliary_heads[0].class_tower[0], model.auxiliary_heads[0].classes):
        nn.init.normal_(layer.weight, std=0.1)
    example = sample()
    images = model.preprocess([example])
    with torch.no_grad():
        memory = model.encode(images)

        def score(tokens):
            maps = model.adapter(memory._replace(tokens=tokens))
            return float(class_logits(model.auxiliary_heads[0], maps, [(75, 90)]).amax(-1).sum())

        total, start = torch.zeros(75, 90), 0
        for height, width in memory.shapes:
            rows = slice(start, start + height * width)
            start += height * width
            level = memory.tokens[0, rows].t().reshape(64, height, width)
            weights = torch.zeros(64)
            for channel in range(64):
                up, down = memory.tokens.clone(), memory.tokens.clone()
                up[0, rows, channel] += 0.02
                down[0, rows, channel] -= 0.02
                weights[channel] = (score(up) - score(down)) / 0.04 / (height * width)
            activation = (weights[:, None, None] * level).sum(0).clamp(min=0)[None, None]
            total += F.interpolate(activation, (96, 96), mode="bilinear")[0, 0, :75, :90]
    expected = (total / total.sum()).numpy()
    _, found = activation_maps(model, example, top=10**6)
    difference = np.abs(found.numpy() - expected).sum()
    assert difference < 0.02  # of 2 at most
    assert np.abs(expected - 1 / expected.size).sum() > 0.2  # a flat map would be found out
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_and_what_has_no_heads(detector):
    from codetr.analyses import head_names, require_collaborative

    assert head_names(detector) == ["FasterRCNN", "ATSS", "RetinaNet", "FCOS", "PAA", "GFL"]
    assert head_names(collaborative("atss", "atss")) == ["ATSS 0", "ATSS 1"]
    with pytest.raises(UserError, match="DeformableDETR has no auxiliary heads"):
        require_collaborative(build(DETR))
    with pytest.raises(UserError, match="CoDETR has no auxiliary heads"):
        require_collaborative(collaborative())


def test_the_command(codetr_tool, shapes_data, save_weights, both_kinds, tmp_path):
    tables = []
    for number, path in enumerate(both_kinds(CO_DETR)):
        command = ["--config-file", path, "--weights", save_weights(CO_DETR), *shapes_data]
        command += ["--device", "cpu", "--num", "2", "--output", str(tmp_path / str(number))]
        assert codetr_tool("head_distance")(command) == 0
        tables.append((tmp_path / str(number) / "head_distance.csv").read_text())
    assert tables[0] == tables[1]
    rows = read(tmp_path / "0" / "head_distance.csv")
    assert [row["head"] for row in rows] == ["main", "FasterRCNN", "ATSS"]
    assert all(float(row[row["head"]]) == 0 for row in rows)
    assert float(rows[1]["ATSS"]) > 0
    mean = (float(rows[1]["ATSS"]) + float(rows[2]["FasterRCNN"])) / 2
    assert float(rows[1]["mean distance"]) == pytest.approx(mean, abs=1e-5)


def test_mistakes_are_one_line(codetr_tool, shapes_data, save_weights, tmp_path, capsys):
    command = ["--config-file", DETR, "--weights", save_weights(DETR), *shapes_data]
    command += ["--device", "cpu", "--output", str(tmp_path)]
    for tool in ("head_distance", "query_distance"):
        assert run_tool(lambda tool=tool: codetr_tool(tool)(command)) == 2
        error = capsys.readouterr().err.strip()
        assert "DeformableDETR has no auxiliary heads" in error
        assert "\n" not in error
        twice = [*command, "--config-file", DETR]
        assert run_tool(lambda tool=tool, twice=twice: codetr_tool(tool)(twice)) == 2
        assert "--config-file is given 2 times, expected once" in capsys.readouterr().err
