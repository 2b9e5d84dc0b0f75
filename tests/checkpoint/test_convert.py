"""Weights of other code bases under our names: what is renamed, reordered, left out or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dense import checkpoint
from d2dense.checkpoint import Correspondence, conversion
from d2dense.errors import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def correspondence(model, names):
    pairs = {"first": "body.0", "second": "body.1", "norm": "bn"}
    return Correspondence(
        names={
            ours: ours.replace(ours.split(".")[0], pairs[ours.split(".")[0]])
            for ours in model.state_dict()
        },
        constants={"table": torch.arange(3)},
        unused=r"teacher\.",
        fresh=r"second\.",
        class_keys={r"body\.1\.": "MODEL.NUM_CLASSES"},
        # their rows are the other way round
        layouts={"first.weight": (lambda v: v.flip(0), lambda v: v.flip(0))},
    )


@pytest.fixture
def source(monkeypatch):
    checkpoint.sources()  # projects register theirs once
    monkeypatch.setattr(conversion, "_SOURCES", dict(conversion._SOURCES))
    checkpoint.register_source("other", correspondence)
    return "other"


def theirs(model: Model) -> dict[str, torch.Tensor]:
    own = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "body.0.weight": own["first.weight"][[2, 1, 0]],
        "body.0.bias": own["first.bias"],
        "body.1.weight": own["second.weight"],
        "body.1.bias": own["second.bias"],
        **{f"bn.{name}": value for name, value in model.norm.state_dict().items()},
        "table": torch.arange(3),
    }


def test_names_and_orders_are_ours_afterwards(source):
    model, file = Model(), theirs(Model())
    weights = checkpoint.convert(file, source, model)
    model.load_state_dict(weights)
    assert torch.equal(model.first.weight, file["body.0.weight"].flip(0))
    assert torch.equal(model.second.bias, file["body.1.bias"])


def test_round_trip(source):
    model = Model()
    back = checkpoint.convert_back(model, source)
    expected = theirs(model)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())
    weights = checkpoint.convert(back, source, model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_expected_gaps_are_told(source):
    model = Model()
    file = theirs(model) | {"teacher.weight": torch.zeros(1)}
    del file["body.1.weight"]
    report = checkpoint.convert_with_report(file, source, model)
    assert report.missing == ("second.weight",)
    assert report.unused == ("teacher.weight", "table")
    assert set(report.weights) == set(model.state_dict()) - {"second.weight"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("body.0.bias"), "no weights for tensors of Model: first.bias"),
        (lambda f: f.update({"body.2.bias": torch.zeros(1)}), "no place for: body.2.bias"),
        (lambda f: f.update({"body.1.bias": torch.zeros(5)}), r"\(5,\) in the file.*\(2,\)"),
        (lambda f: f.clear(), "first.weight, first.bias, norm.weight and 3 more"),
    ],
)
def test_unexpected_gaps_and_shapes_are_errors(source, change, words):
    model = Model()
    file = theirs(model)
    change(file)
    with pytest.raises(UserError, match=words):
        checkpoint.convert(file, source, model)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"body.1.weight": (5, 3), "body.1.bias": (5,)}, "set MODEL.NUM_CLASSES to the file's"),
        ({"body.1.bias": (5,), "body.0.bias": (4,)}, "use the config of the model"),
    ],
)
def test_every_other_shape_is_named_with_what_to_change(source, shapes, words):
    file = theirs(Model()) | {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=words) as error:
        checkpoint.convert(file, source, Model())
    assert all(
        f"{name} has shape {shape} in the file" in str(error.value)
        for name, shape in shapes.items()
    )


def test_prefix_of_training_on_several_devices_and_batch_counts_do_not_matter(source):
    model = Model()
    file = {f"module.{name}": value for name, value in theirs(model).items()}
    assert checkpoint.convert(file, source, model).keys() == model.state_dict().keys()
    del file["module.bn.num_batches_tracked"]
    report = checkpoint.convert_with_report(file, source, model)
    assert report.missing == ("norm.num_batches_tracked",)


def test_sources_are_named_once_and_known_by_name(source):
    assert {"other", "cednet"} <= set(checkpoint.sources())
    with pytest.raises(UserError, match="did you mean 'cednet'"):
        checkpoint.convert({}, "cednett", Model())
    with pytest.raises(ValueError, match="registered already"):
        checkpoint.register_source("other", correspondence)


def test_tensors_without_a_name_there_cannot_go_back(source):
    model = Model()
    monkey = checkpoint.convert_back(model, source)
    assert "bn.weight" in monkey
    with pytest.raises(UserError, match=r"cednet has no names for first\.weight"):
        checkpoint.convert_back(model, "cednet")
