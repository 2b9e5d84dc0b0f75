"""Weights of other classes or another number of queries."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from d2dense import config, model_zoo
from d2dense.checkpoint import KeptRows, load_weights
from d2dense.data.classes import class_names
from d2dense.engine.experiment import experiment
from d2dense.engine.trainer import load_initial_weights
from d2dense.errors import UserError

OLD = ["Traffic Light", "dog", "cat", "kite"]
NEW = ["cat", "zebra", "traffic-light"]


class Heads(nn.Module):
    """What there is of classes in detectors, and queries."""

    query_rows = ("queries",)

    def __init__(self, classes, queries):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, 2))
        self.scores = nn.Linear(2, classes)
        self.with_background = nn.Linear(2, classes + 1)
        self.boxes = nn.Linear(2, 4 * classes)
        self.maps = nn.Conv2d(2, classes, 3)
        self.wide = nn.Linear(classes, 2)  # columns, not rows
        self.trunk = nn.Linear(2, 2)


def loaded(tmp_path, queries):
    file, model = Heads(4, 5), Heads(3, queries)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": file.state_dict()}, tmp_path / "a.pth")
    kept = KeptRows(model, file_classes=OLD, classes=NEW)
    report = load_weights(model, tmp_path / "a.pth", kept_rows=kept)
    return file.state_dict(), fresh, model.state_dict(), report


def test_classes_of_the_same_name_are_loaded_and_the_others_start_afresh(tmp_path):
    file, fresh, found, report = loaded(tmp_path, 5)
    for name in ("scores.weight", "scores.bias", "maps.weight", "maps.bias"):
        expected = torch.stack([file[name][2], fresh[name][1], file[name][0]])
        assert torch.equal(found[name], expected), name
    for name in ("with_background.weight", "with_background.bias"):
        rows = [file[name][2], fresh[name][1], file[name][0], file[name][4]]
        assert torch.equal(found[name], torch.stack(rows)), name
    boxes = torch.cat([file["boxes.bias"][8:12], fresh["boxes.bias"][4:8], file["boxes.bias"][:4]])
    assert torch.equal(found["boxes.bias"], boxes)
    assert torch.equal(found["wide.weight"], fresh["wide.weight"])
    assert torch.equal(found["trunk.weight"], file["trunk.weight"])
    assert [name for name, _, _ in report.misshaped] == ["wide.weight"]
    assert ("with_background.bias", 3, 4) in report.partial
    with pytest.raises(UserError, match=r"wide.weight"):
        report.require_shapes()


@pytest.mark.parametrize("queries", [3, 8])
def test_the_first_queries_are_kept(tmp_path, queries):
    file, fresh, found, report = loaded(tmp_path, queries)
    count = min(queries, 5)
    assert torch.equal(found["queries"][:count], file["queries"][:count])
    assert torch.equal(found["queries"][count:], fresh["queries"][count:])
    assert ("queries", count, queries) in report.partial


def test_without_names_of_classes_only_queries_are_kept(tmp_path):
    file, model = Heads(4, 5), Heads(3, 2)
    fresh = model.scores.weight.clone()
    torch.save({"model": file.state_dict()}, tmp_path / "a.pth")
    report = load_weights(model, tmp_path / "a.pth", kept_rows=KeptRows(model))
    assert [name for name, _, _ in report.partial] == ["queries"]
    assert torch.equal(model.scores.weight, fresh)


def test_no_common_class_is_one_line():
    with pytest.raises(UserError, match=r"none of the 1 classes.*INIT_CLASSES"):
        KeptRows(Heads(3, 2), file_classes=["cat"], classes=["dog"])


NAME = "CoDETR/co_dino_tiny_shapes"


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_a_detector_of_other_classes_and_queries_starts_a_training(tmp_path, kind):
    file = tmp_path / "o.json"
    names = [*reversed(class_names("shapes_train")), "bus", "tree"]
    categories = [{"id": 3 * i, "name": name.upper()} for i, name in enumerate(names)]
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    counts = {"yaml": ["MODEL.DETR.NUM_CLASSES", "12"], "lazy": ["model.num_classes=12"]}
    counts["yaml"] += ["MODEL.DETR.NUM_QUERIES", "80"]
    counts["lazy"] += ["model.queries.num_queries=80"]
    source = config.build_model(
        config.load(model_zoo.get_config_file(NAME, kind), counts[kind]), device="cpu"
    )
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    keys = {
        "yaml": ["MODEL.WEIGHTS", "TRAIN.INIT_CLASSES"],
        "lazy": ["train.init_checkpoint", "train.init_classes"],
    }[kind]
    overrides = [keys[0], str(tmp_path / "a.pth"), keys[1], str(file)]
    run = experiment(config.load(model_zoo.get_config_file(NAME, kind), overrides), device="cpu")
    model = run.build_model()
    report = load_initial_weights(run, model)
    assert report.misshaped == report.missing == ()
    assert "denoising.label_embedding.weight" in [name for name, _, _ in report.partial]
    ours, theirs = model.state_dict(), source.state_dict()
    assert torch.equal(ours["queries.content.weight"], theirs["queries.content.weight"][:50])
    for name in ("heads.classes.1.weight", "auxiliary_heads.1.classes.weight"):
        assert torch.equal(ours[name], theirs[name][:10].flip(0)), name
