"""The Python in the pages: it compiles, and what the general pages show runs."""

from __future__ import annotations

import inspect
import textwrap

import cv2
import numpy as np
import pytest
import torch

from d2dense import export, model_zoo
from tests.docs.pages import ROOT, fenced, pages

BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{block.line}")
    for page in pages()
    for block in fenced(page.read_text())
    if block.kind == "python"
]


def block_with(page, text):
    (found,) = [each.text for each in fenced((ROOT / page).read_text()) if text in each.text]
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_it_compiles(block):
    compile(block.text, "page", "exec")


def test_models_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    text = block_with("README.md", "model_zoo.list_models()")
    exec(text.replace("fscascade_r50_fpn_1x", "fscascade_tiny_shapes"), names)
    assert names["model"].roi_heads.num_classes == 3
    assert (tmp_path / "mine.yaml").is_file()


def test_predictions_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "output/demo/train/model_final.pth"
    weights.parent.mkdir(parents=True)
    model = model_zoo.get_model("FSCascade/fscascade_tiny_shapes")
    torch.save({"model": model.state_dict()}, weights)
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite("photo.jpg", noise)
    exec(block_with("README.md", "Predictor("), {})
    assert "Boxes(tensor(" in capsys.readouterr().out


def test_the_use_of_an_exported_file_is_what_the_library_says():
    """Which ``tests/export/test_example.py`` runs."""
    text = inspect.cleandoc(export.__doc__).partition("With TorchScript::\n\n")[2]
    example = textwrap.dedent(text.partition("\n\nTo evaluate")[0])
    assert block_with("docs/deployment.md", "torch.jit.load").strip() == example.strip()
