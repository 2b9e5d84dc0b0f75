"""Archives that would run code when they are opened are refused before they are."""

import json
import logging
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from d2dense.errors import UserError
from d2dense.export.adapters import BOXES, Adapter
from d2dense.export.exported_program import open_exported_program, save_exported_program

MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
INPUTS = "data/sample_inputs/model.pt"


class _Columns(Adapter):
    """As many results as the image has columns, where it is bright."""

    outputs = (BOXES,)

    def forward(self, image):
        means = image.mean(dim=(0, 1))
        return (means[(means > 0).nonzero()[:, 0]][:, None] * self.model.weight,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file as the export writes it."""
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    adapter = _Columns(nn.Linear(4, 1, bias=False)).eval().requires_grad_(False)
    save_exported_program(adapter, torch.zeros(3, 64, 64), path)
    return path


class _Attack:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def changed(plain, path, edit):
    """Write a copy of an archive; ``edit`` changes a dict of its members, below the root."""
    with zipfile.ZipFile(plain) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {n.removeprefix(f"{root}/"): archive.read(n) for n in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return path


def in_json(member, change):
    """Return an edit of one JSON member."""

    def edit(members):
        content = json.loads(members[member])
        change(content)
        members[member] = json.dumps(content).encode()

    return edit


def graph_of(content):
    return content["graph_module"]["graph"]


def some_expression(content):
    return next(each["as_expr"] for each in graph_of(content)["sym_int_values"].values())


def test_a_plain_file_opens(plain, tmp_path):
    copy = changed(plain, tmp_path / "model.pt2", lambda members: None)
    image = torch.rand(3, 40, 50)
    found = [open_exported_program(path, "cpu")(image)[0] for path in (plain, copy)]
    assert found[0].shape == (50, 4)
    assert torch.equal(*found)


def test_no_lines_of_the_source(plain):
    with zipfile.ZipFile(plain) as archive:
        model = archive.read(f"model/{MODEL}").decode()
    assert __file__ not in model
    assert "line " not in model


def _library(members):
    members["data/aotinductor/model/x.so"] = b"\x7fELF"


def _pickled_weight(content):
    next(iter(content["config"].values()))["use_pickle"] = True


def _operator(content):
    graph_of(content)["nodes"][0]["target"] = "torch.os.system"


def _reader_of_files(content):
    graph_of(content)["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def _name(content):
    graph_of(content)["nodes"][0]["name"] = "x = 1\n    import os"


def _argument(content):
    graph_of(content)["inputs"][0]["as_tensor"]["name"] = "x=print(1)"


def _expression(content):
    some_expression(content)["expr_str"] = "__import__('os').mkdir('x')"


def _expression_by_attribute(content):
    some_expression(content)["expr_str"] = "Integer(1).__class__"


def _expression_with_text(content):
    some_expression(content)["expr_str"] = "Symbol('print(1)')"


def _deep_expression(content):
    some_expression(content)["expr_str"] = "Add(" * 5000 + "1" + ")" * 5000


def _guard(content):
    content["guards_code"] = ["print(1)"]


def _packing(content):
    (entry,) = content["graph_module"]["module_call_graph"][:1]
    entry["signature"]["in_spec"] = json.dumps(
        [1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]
    )


ATTACKS = {
    "library": (_library, "the member 'data/aotinductor/model/x.so'"),
    "pickled_weight": (in_json(WEIGHTS, _pickled_weight), "the entry 'use_pickle'"),
    "operator": (in_json(MODEL, _operator), "the operator 'torch.os.system'"),
    "reader_of_files": (in_json(MODEL, _reader_of_files), "the operator 'torch.ops.aten.from_file"),
    "name": (in_json(MODEL, _name), "the name 'x = 1"),
    "argument": (in_json(MODEL, _argument), "the name 'x=print"),
    "expression": (in_json(MODEL, _expression), 'the expression "__import__'),
    "attribute": (in_json(MODEL, _expression_by_attribute), "the expression 'Integer"),
    "text": (in_json(MODEL, _expression_with_text), 'the expression "Symbol'),
    "deep": (in_json(MODEL, _deep_expression), "the expression 'Add"),
    "guard": (in_json(MODEL, _guard), "the entry 'guards_code'"),
    "packing": (in_json(MODEL, _packing), "the type 'collections.defaultdict'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_may_run_is_refused(plain, tmp_path, monkeypatch, attack):
    edit, reason = ATTACKS[attack]
    path = changed(plain, tmp_path / "model.pt2", edit)
    monkeypatch.setattr(
        "d2dense.export.exported_program.load_pt2", lambda path: pytest.fail("it was opened")
    )
    with pytest.raises(UserError) as caught:
        open_exported_program(path, "cpu")
    assert f"has {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run(plain, tmp_path):
    """The attack is real: PyTorch's own function runs it."""
    mark = tmp_path / "mark"

    def edit(members):
        members[INPUTS] = _pickled(_Attack(mark), tmp_path)

    path = changed(plain, tmp_path / "model.pt2", edit)
    with pytest.raises(UserError, match="pickled example inputs"):
        open_exported_program(path, "cpu")
    assert not mark.exists()
    logging.disable()  # PyTorch's warning of its fallback
    try:
        torch.export.load(path)
    except Exception:  # what was unpickled is no tuple of inputs
        pass
    finally:
        logging.disable(logging.NOTSET)
    assert mark.exists()


def _pickled(value, folder):
    torch.save(value, folder / "value.pt", pickle_module=pickle)
    return (folder / "value.pt").read_bytes()
