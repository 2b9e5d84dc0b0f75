"""Every backbone under every head, in both kinds of config, and the table that says so."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from d2dense import model_zoo
from d2dense.composition_cells import HEADS, IMPORTS, SOURCES
from d2dense.composition_report import RECIPES, TABLES, WORKS, pairs
from d2dense.composition_trial import KINDS, Head, build, config_of, faults, lines, try_model
from d2dense.errors import UserError
from tests.conftest import ROOT
from tests.projects.parity import held_by, on_meta, settings_of
from tools import composition_matrix

CELLS = [(head, source, kind) for head in HEADS for source in SOURCES for kind in KINDS]
BY_NAME = {head.name: head for head in HEADS}
_shapes: dict[tuple[str, str], dict] = {}  # of the first kind of a cell that was built
_tried: dict[tuple[str, str], tuple] = {}
_idle: dict[str, set] = {}


def test_what_there_is():
    assert {source.name for source in SOURCES} == {"ResNet", "CEDNet", "timm", "ViT", "ViTDet"}
    assert [head.name for head in HEADS] == [
        *("RetinaNet", "Faster R-CNN", "Mask R-CNN", "Cascade R-CNN", "FSCascade"),
        *("Deformable-DETR", "DINO", "Co-DETR", "SemanticFPN", "UperNet", "HFGD"),
    ]
    assert len(CELLS) == 110


@pytest.mark.parametrize(
    ("head", "source", "kind"),
    [pytest.param(*cell, id=f"{cell[0].name}-{cell[1].name}-{cell[2]}") for cell in CELLS],
)
def test_cell(head, source, kind):
    """A model that is, layer for layer and setting for setting, the one that the other kind of
    config gave is not tried a second time.
    """
    model = build(config_of(source, head, kind, imports=IMPORTS))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert _shapes.setdefault((head.name, source.name), shapes) == shapes  # yaml equals lazy
    assert type(model.backbone).__name__ in {
        *("PaddedFPN", "FPN", "ResNet", "CEDNet", "TimmBackbone", "ViTPyramid")
    }
    everything = str(model), settings_of(model), held_by(model)
    if _tried.get((head.name, source.name)) == everything:
        return
    outcome = try_model(model, semantic=head.semantic)
    assert faults(head, outcome) == []
    _tried[head.name, source.name] = everything
    _idle.setdefault(head.name, set()).update(outcome.idle)


def test_every_exception_is_needed():
    """It follows the cells in this file."""
    for head in HEADS:
        if head.name in _idle:
            for pattern in head.idle:
                assert any(re.search(pattern, name) for name in _idle[head.name])


def test_only_hfgd_has_exceptions():
    assert [head.name for head in HEADS if head.idle] == ["HFGD"]


# ------------------------------------------------ the trial finds what is wrong


class Toy(nn.Module):
    """A detector of one weight, with a second one that nothing uses."""

    def __init__(self, loss=lambda weight: weight.sum()):
        super().__init__()
        self.weight, self.spare = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.loss = loss

    def forward(self, batch):
        if self.training:
            return {"loss_toy": self.loss(self.weight)}
        return [{"instances": []} for _ in batch]


HEAD = Head(name="toy", recipe="", takes="maps")


def test_parameters_without_a_gradient_are_named_unless_explained():
    outcome = try_model(Toy(), semantic=False)
    assert outcome.idle == ["spare"]
    assert (outcome.parameters, outcome.moved, outcome.losses) == (5, 1, {"loss_toy": 3.0})
    assert faults(HEAD, outcome) == ["no gradient for spare"]
    explained = Head(name="toy", recipe="", takes="maps", idle={"^spare$": "it is spare"})
    assert faults(explained, outcome) == []


def test_a_step_that_changes_nothing_and_missing_results_are_faults():
    outcome = try_model(Toy(lambda weight: 0 * weight.sum()), semantic=False)
    assert "a step of SGD changed nothing" in faults(HEAD, outcome)
    outcome.lengths = [1]
    assert any("results [1]" in each for each in faults(HEAD, outcome))
    scores = Head(name="toy", recipe="", takes="maps", semantic=True)
    outcome.lengths = [(5, 48, 64), (5, 40, 64)]  # the second is 64 x 40
    assert any("results" in each for each in faults(scores, outcome))


@pytest.mark.parametrize("loss", [lambda w: w.sum() / 0, lambda w: (w - 1).sqrt().sum()])
def test_losses_and_gradients_must_be_finite(loss):
    with pytest.raises(ArithmeticError, match="not finite"):
        try_model(Toy(loss), semantic=False)


# ------------------------------------------------ the table


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "docs" / "composition.json").read_text())


def test_the_table_has_exactly_the_cells_that_there_are(report):
    rows = report["rows"][TABLES["cells"]]
    found = {(row["head"], name): text for row in rows for name, text in row.items()}
    found = {cell: text for cell, text in found.items() if cell[1] != "head"}
    assert set(found) == {(head.name, source.name) for head, source, _ in CELLS}
    assert set(found.values()) == {f"{WORKS} / {WORKS}"}
    assert report["command"] == "tools/composition_matrix.py --output docs/composition"


def test_the_table_has_the_lines_that_are_tested(report):
    written = {row[kind] for row in report["rows"][TABLES["lines"]] for kind in KINDS}
    for head, source, kind in CELLS:
        text = lines(source, Head(name="", recipe="", takes=head.takes), kind)
        line = pairs(text) if kind == "yaml" else text.replace("\n", "; ")
        assert f"`{line}`" in written
    heads = {row["head"]: row["recipe"] for row in report["rows"][TABLES["names"]]}
    assert heads == {head.name: head.recipe for head in HEADS}


def test_the_table_has_the_recipes(report):
    rows = {row["model"]: row for row in report["rows"][TABLES["recipes"]]}
    assert set(rows) == set(RECIPES)
    assert {row["kinds"] for row in rows.values()} == {"lazy, yaml"}
    for name, row in rows.items():
        whole = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
        if name.startswith("FSCascade"):  # all of it works in inference
            assert row["params M"] == pytest.approx(whole, abs=0.006)
        assert 0.5 * whole < row["params M"] < whole + 0.006
        assert row["GMACs"] > 1


def test_the_command(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no head 'Retinanet'.*RetinaNet"):
        composition_matrix.main(["--output", str(tmp_path / "x"), "--heads", "Retinanet"])
    text = (ROOT / "docs" / "composition.md").read_text()
    assert "What works (lazy / yaml)" in text
    assert text.count(f"{WORKS} / {WORKS}") == len(CELLS) // 2


# ------------------------------------------------ recipes that combine papers, made small


def shrunk(name: str):
    """The recipe with the small head of its cell, and a small trunk."""
    head = next(
        BY_NAME[each]
        for start, each in (
            ("FSCascade/", "FSCascade"),
            ("CoDETR/", "Co-DETR"),
            ("HFGD/", "HFGD"),
        )
        if name.startswith(start)
    )
    cfg = model_zoo.get_config(name)
    trunk = next(each for each in SOURCES if each.name == "CEDNet").setup["lazy"]
    code = "\n".join([IMPORTS, trunk, head.small["lazy"], "model.backbone.trunk = trunk"])
    exec(code, {"model": cfg.model})
    return head, cfg


@pytest.mark.parametrize("name", [name for name in RECIPES if "cednet" in name])
def test_recipes_train(name):
    head, cfg = shrunk(name)
    outcome = try_model(build(cfg), semantic=head.semantic)
    assert faults(head, outcome) == []
    if "mask" in name:
        assert "loss_mask" in outcome.losses
