"""Distances of queries to customised positives, against loops and constructed matches."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from PIL import Image

from d2dense import config
from d2dense.analyses.matching import match
from d2dense.analyses.query_distance import ObjectDistance, object_distances, query_report
from d2dense.errors import UserError
from tests.analyses.tiny import CO_DETR, collaborative, sample

HEADS = ("faster_rcnn", "atss", "retinanet", "fcos", "paa", "gfl")


def test_worked_example():
    """A picture of 30 x 40, whose diagonal is 50; object 1 has no query, object 2 no positive."""
    queries = torch.tensor([[3.0, 4.0], [30.0, 0.0], [0.0, 0.0], [0.0, 30.0]])
    objects = torch.tensor([0, 2, -1, -1])
    positives = torch.tensor([[0.0, 0.0], [6.0, 8.0], [20.0, 20.0]])
    owners = torch.tensor([0, 0, 1])
    found = object_distances(queries, objects, positives, owners, (30, 40))
    assert list(found) == [0]
    count, matched, others = found[0]
    assert count == 2
    assert matched == pytest.approx((5 + 5) / 2 / 50)
    free = (0 + 10 + 30 + math.hypot(6, 22)) / 4
    assert others == pytest.approx(free / 50)


def test_every_query_has_an_object():
    found = object_distances(
        torch.tensor([[3.0, 4.0]]), torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0]), (3, 4)
    )
    assert found[0][1] == pytest.approx(1)
    assert math.isnan(found[0][2])


@pytest.fixture(scope="module")
def detector():
    return collaborative(*HEADS)


def test_positives_are_those_of_their_objects(detector):
    """Objects of different classes: the label that a head gives a candidate tells its object."""
    from codetr.analyses import customised_positives

    example = sample()
    boxes, classes = example["instances"].gt_boxes.tensor, example["instances"].gt_classes
    images = detector.preprocess([example])
    with torch.no_grad():
        maps = detector.adapter(detector.encode(images))
    found = customised_positives(detector, example)
    for name, head, (centres, owners) in zip(HEADS, detector.auxiliary_heads, found):
        torch.manual_seed(0)
        _, candidates = head.losses(maps, [example["instances"]])
        expected = []
        for box, label, usable in zip(
            candidates.boxes[0].tolist(), candidates.labels[0].tolist(), candidates.usable[0]
        ):
            if usable and label != 10:
                owner = classes.tolist().index(label)
                expected.append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, owner))
        together = torch.cat([centres, owners[:, None]], dim=1)
        torch.testing.assert_close(together, torch.tensor(expected), msg=name)
        assert set(owners.tolist()) == {0, 1}, name
        if name == "atss":  # which assigns only what is inside the object
            own = boxes[owners]
            assert ((centres > own[:, :2]) & (centres < own[:, 2:])).all()


def test_distances_of_a_detector_against_loops(detector):
    from codetr.analyses import customised_positives, query_distances

    example = sample()
    found = query_distances(detector, example, image="7")
    matched = match(detector, example)
    with torch.no_grad():
        memory = detector.encode(detector.preprocess([example]))
        references = detector.queries(memory).references[0]
    places = [(x * 90, y * 75) for x, y, *_ in references.tolist()]
    names = ["FasterRCNN", "ATSS", "RetinaNet", "FCOS", "PAA", "GFL"]
    expected = []
    for name, (centres, owners) in zip(names, customised_positives(detector, example)):
        for number in (0, 1):
            mine = [c for c, owner in zip(centres.tolist(), owners.tolist()) if owner == number]

            def distance(query, mine=mine):
                return np.mean([math.dist(places[query], c) for c in mine]) / math.hypot(75, 90)

            (own,) = (q for q, k in enumerate(matched.objects.tolist()) if k == number)
            free = [q for q, k in enumerate(matched.objects.tolist()) if k < 0]
            assert len(free) == 48
            values = (distance(own), np.mean([distance(q) for q in free]))
            expected.append(("7", number, name, len(mine), *values))
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    np.testing.assert_allclose([r[4:] for r in found], [r[4:] for r in expected], rtol=1e-4)


def test_asking_leaves_the_random_numbers_alone(detector):
    from codetr.analyses import query_distances

    before = torch.get_rng_state()
    first = query_distances(detector, sample(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert query_distances(detector, sample(), seed=3) == first


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_report(tmp_path):
    rows = [
        ObjectDistance("1", 0, "a", 3, 0.1, 0.5),
        ObjectDistance("1", 0, "b", 1, 0.3, math.nan),
        ObjectDistance("2", 4, "a", 2, 0.2, 0.3),
        ObjectDistance("2", 4, "b", 2, 0.2, 0.6),
    ]
    means = query_report(rows, tmp_path, images=2)
    assert means == {"a": pytest.approx((0.15, 0.4)), "b": pytest.approx((0.25, 0.6))}
    written = read(tmp_path / "query_distance.csv")
    assert list(written[0]) == ["image", "object", "head", "positives", "matched", "others"]
    assert [row["head"] for row in written] == ["a", "b", "a", "b"]
    assert float(written[2]["matched"]) == 0.2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean_distance"]["b"]["others"] == pytest.approx(0.6)
    width, height = Image.open(tmp_path / "query_distance.png").size
    assert width > 2 * height  # two heads
    with pytest.raises(UserError, match="no object has both a query and a customised positive"):
        query_report([], tmp_path, images=2)


def test_the_command(codetr_tool, shapes_data, save_weights, both_kinds, tmp_path):
    tables = []
    for number, path in enumerate(both_kinds(CO_DETR)):
        command = ["--config-file", path, "--weights", save_weights(CO_DETR), *shapes_data]
        command += ["--device", "cpu", "--num", "2", "--output", str(tmp_path / str(number))]
        assert codetr_tool("query_distance")(command) == 0
        tables.append((tmp_path / str(number) / "query_distance.csv").read_text())
    assert tables[0] == tables[1]
    rows = read(tmp_path / "0" / "query_distance.csv")
    assert {row["head"] for row in rows} == {"FasterRCNN", "ATSS"}
    assert len({row["image"] for row in rows}) == 2
    assert all(0 <= float(row[key]) < 1 for row in rows for key in ("matched", "others"))


def test_a_head_that_learns_masks_gets_them(codetr_tool, shapes_data, save_weights, tmp_path):
    """Configs load no masks in tests; the head's losses, which are asked, need them."""
    cfg = config.load(CO_DETR)
    path = tmp_path / "masks.yaml"
    from codetr import nodes

    cfg.model = nodes.collaborative(cfg.model, "mask_rcnn")
    cfg.model.auxiliary_heads[0].rpn.train_proposals = 100
    LazyConfig.save(cfg, str(path))
    command = ["--config-file", str(path), "--weights", save_weights(path), *shapes_data]
    command += ["--device", "cpu", "--num", "1", "--output", str(tmp_path)]
    assert codetr_tool("query_distance")(command) == 0
    assert {row["head"] for row in read(tmp_path / "query_distance.csv")} == {"MaskRCNN"}
