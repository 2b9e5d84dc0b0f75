"""The command that tries every way of exporting, and its committed table."""

import importlib.util
import json

import pytest

from d2dense import config, model_zoo
from d2dense.errors import run_tool
from d2dense.export import matrix
from d2dense.export.reduction import reduced, structure
from d2dense.export.support import WAYS

TINY = ["CEDNet/classifier_cednet_tiny_objects", "CoDETR/co_dino_tiny_shapes"]


@pytest.fixture(scope="module")
def main(request):
    path = request.config.rootpath / "tools" / "export_matrix.py"
    spec = importlib.util.spec_from_file_location("export_matrix_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_few_models(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_zoo, "list_models", lambda: TINY)
    command = ["--output", str(tmp_path / "export"), "--formats", "script"]
    assert run_tool(lambda: main(command)) == 0
    report = json.loads((tmp_path / "export.json").read_text())
    (first,), (second,) = (report["rows"][f"{name}, reduced"] for name in ("CEDNet", "CoDETR"))
    assert first["model"] == TINY[0]
    assert 0 <= float(first["script"].removeprefix("ok, ")) < 1e-4
    assert second["script"] == "refused [1]"
    assert first["onnx"] == second["onnx"] == "not tried yet"
    assert any(note.startswith("[1] a detection transformer") for note in report["notes"])
    # a second run has nothing left to do
    monkeypatch.setattr(matrix, "_export", lambda *args: pytest.fail("it was exported again"))
    assert run_tool(lambda: main(command)) == 0
    again = json.loads((tmp_path / "export.json").read_text())
    assert again["results"] == report["results"]
    text = (tmp_path / "export.md").read_text()
    assert text.count("not tried yet") == 2 * (len(WAYS) - 1)


def test_what_fails_is_tried_again(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(matrix, "_export", fail)
    rows = matrix.rows_of(TINY[:1])
    found = matrix.Matrix(tmp_path / "export", command="")
    found.run(rows, ways=["trace"])
    assert "fails [1]" in (tmp_path / "export.md").read_text()
    assert "[1] RuntimeError: no kernel\n" in (tmp_path / "export.md").read_text()
    works = {"error": 2e-6, "found": 1, "bytes": 1, "seconds": 0.1}
    monkeypatch.setattr(matrix, "_export", lambda *args: works)
    found = matrix.Matrix(tmp_path / "export", command="the tool")
    found.run(rows, ways=["trace"], full=TINY[:1])
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["command"] == f"the tool --full {TINY[0]}"
    assert report["rows"]["CEDNet, reduced"][0]["trace"] == "ok, 2e-06"
    assert report["rows"]["Full size"][0]["trace"] == "ok, 2e-06, 0 MiB, 0 s"


@pytest.mark.parametrize(
    ("name", "alike", "other"),
    [
        ("fscascade_r50_fpn_1x", "fscascade_r101_fpn_2x", "cascade_rcnn_r50_fpn_1x"),
        ("fscascade_cfs_r50_fpn_1x", "fscascade_cfs_r50_fpn_1x", "fscascade_lfs_r50_fpn_1x"),
    ],
)
def test_structures(name, alike, other):
    keys = [structure(reduced(config.load(f"FSCascade/{n}"))) for n in (name, alike, other)]
    assert keys[0] == keys[1] != keys[2]


def kinds(model):
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize(
    "name",
    [
        "CEDNet/retinanet_cednet_next_s",
        "CEDNet/mask_rcnn_cednet_cswin_t",
        "CEDNet/retinanet_convnext_t_fpn",
        "CoDETR/deformable_detr_r50_1x",
        "HFGD/hfgd_swin_l_os4_pascal_context",
    ],
)
def test_a_reduced_model_has_every_kind_of_module(name):
    import torch

    cfg = config.load(name)
    with torch.device("meta"):
        full = config.build_model(cfg, device="meta")
        small = config.build_model(reduced(cfg), device="meta")
    assert kinds(full) == kinds(small)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, full)]
    assert sizes[0] < 0.9 * sizes[1]


def test_the_committed_table_has_every_model(repo_root):
    """Fails when a model was added without running tools/export_matrix.py (it goes on quickly)."""
    report = json.loads((repo_root / "docs" / "export.json").read_text())
    tables = (rows for heading, rows in report["rows"].items() if heading.endswith("reduced"))
    names = [row["model"] for rows in tables for row in rows]
    assert sorted(names) == model_zoo.list_models()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "onx"], "did you mean 'onnx'?"),
        (["--full", "CEDNet/nothing"], "--full CEDNet/nothing: no such model"),
    ],
)
def test_mistakes_are_one_line(main, monkeypatch, tmp_path, capsys, flags, message):
    monkeypatch.setattr(model_zoo, "list_models", lambda: TINY)
    assert run_tool(lambda: main(["--output", str(tmp_path / "export"), *flags])) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
