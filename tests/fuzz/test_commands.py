"""Command lines of every tool, up to where the work would start."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from d2dense.errors import run_tool
from tests.fuzz.harness import attempt, fuzz
from tests.tools import tiny_detector  # noqa: F401  registers a model of a few parameters

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
MODEL: {META_ARCHITECTURE: TinyDetector, DEVICE: cpu, ROI_HEADS: {NUM_CLASSES: 3}}
DATASETS: {TRAIN: [shapes_train], TEST: [shapes_val]}
VERSION: 2
"""
FLAGS = {
    "train_net": ["--config-file", "--resume", "--eval-only", "--num-gpus", "--num-machines",
                  "--machine-rank", "--dist-url", "--device"],
    "print_config": ["--config-file", "--output"],
    "demo": ["--config-file", "--weights", "--input", "--output", "--confidence-threshold",
             "--score-threshold", "--classes", "--top-k", "--batch-size", "--device", "--no-draw",
             "--opts"],
    "analyze_model": ["--config-file", "--tasks", "--input-size", "--depth", "--json"],
    "export_model": ["--config-file", "--format", "--method", "--output", "--weights",
                     "--sample-image", "--evaluate"],
    "check_dataset": ["--config-file", "--dataset", "--kind", "--json", "--images", "--labels",
                      "--classes", "--ignore-label", "--task", "--masks", "--fast", "--workers"],
    "visualize_data": ["--config-file", "--dataset", "--output", "--num", "--scale"],
    "visualize_predictions": ["--predictions", "--dataset", "--json", "--images", "--output",
                              "--num", "--score-threshold"],
    "make_shapes": ["--output", "--train", "--val", "--size", "--seed", "--objects", "--workers",
                    "--overwrite", "--if-missing"],
}  # fmt: skip


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(f"fuzzed_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nothing(*args, **kwargs):
    return SimpleNamespace(batch_size=1, metadata=SimpleNamespace())


def _stop_before_work(name: str, module, monkeypatch) -> None:
    """Replace what would train, predict, export or draw: this is about what leads there."""
    if name == "train_net":
        monkeypatch.setattr("d2dense.engine.train_net.launch", _nothing)
    elif name == "demo":
        monkeypatch.setattr(module, "Predictor", _nothing)
        monkeypatch.setattr(module.Demo, "run", lambda self: 0)
        monkeypatch.setattr(module, "CocoResults", _nothing)
        monkeypatch.setattr(module, "class_indices", _nothing)
    elif name == "analyze_model":
        monkeypatch.setattr(module.costs, "analyze", lambda *args, **kwargs: {})
        monkeypatch.setattr(module.costs, "format_report", lambda *args, **kwargs: "")
    elif name == "export_model":
        monkeypatch.setattr(module.export, "export", _exported)
        monkeypatch.setattr(module.export, "evaluate_exported", lambda *args: {})
    elif name == "visualize_data":
        monkeypatch.setattr(module.visualize, "write_sample", _nothing)
        monkeypatch.setattr(module, "from_config", lambda args: (iter(()), "shapes_train", "BGR"))
    elif name == "make_shapes":
        monkeypatch.setattr(module.shapes, "generate", _nothing)


def _exported(config_file, *, overrides, **kwargs):
    from d2dense import config

    config.load(config_file, overrides)
    return SimpleNamespace(
        path="", metadata_path="", task="detection", checks=[], max_error=0.0, **kwargs
    )


def _words(flags, config_file, tmp_path):
    """Flags, values of all sorts, overrides, in any order."""
    odd = [
        "",
        " ",
        "-",
        "--",
        "---",
        "-x",
        "--x=1",
        "=",
        "é",
        "\udcff",
        "\x00",
        "\n",
        "a" * 5000,
        "-1",
    ]
    odd += ["1e999", "nan", "inf", "10" * 200, "0x10", "1.5", "--config-file=", "--conf", "\u2028"]
    paths = [
        config_file,
        "FSCascade/fscascade_tiny_shapes",
        "/dev/null",
        str(tmp_path),
        "/x/y.yaml",
    ]
    paths += [str(tmp_path / "none.json"), "~", "../..", "*.jpg", "[", "**", f"{tmp_path}/file/x"]
    values = ["0", "1", "-5", "2", "cpu", "cuda", "cuda:99", "tcp://a:b", "auto", "trace", "flops"]
    values += ["shapes_train", "none_train", "coco", "params", "onnx", "0.5", "0.1"]
    overrides = ["SEED", "SEED=1", "MODEL.X=1", "SOLVER.BASE_LR", "OUTPUT_DIR=a", "model={}", "[1"]
    word = st.sampled_from([*odd, *paths, *values, *overrides]) | st.text(max_size=6)
    flag = st.sampled_from(flags)
    given = st.tuples(flag, word).map(lambda pair: f"{pair[0]}={pair[1]}")
    some = st.lists(flag | word | given, max_size=6)
    start = st.sampled_from(
        [[], [flags[0], config_file], [flags[0], config_file, "--output", str(tmp_path / "out")]]
    )
    return st.tuples(start, some).map(lambda parts: [*parts[0], *parts[1]])


def _code_of(main) -> int:
    try:
        return main()
    except SystemExit as stop:  # --help
        return stop.code


@pytest.mark.parametrize("name", FLAGS)
def test_command_lines(profile, name, tmp_path, monkeypatch):
    module = _tool(name)
    _stop_before_work(name, module, monkeypatch)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(CONFIG)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.CRITICAL)

    def run(argv) -> None:
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])

        def main() -> int:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                return run_tool(lambda: module.main(argv))

        code = attempt(lambda: _code_of(main))
        text = err.getvalue()
        assert "Traceback" not in text
        if code == 2:
            assert text.startswith("error: ")
            assert text.count("\n") == 1, text
        else:
            assert code in (0, 1), code

    words = _words(FLAGS[name], str(config_file), tmp_path)
    try:
        fuzz(profile, words, run, name=f"command line of {name}", quick=25, factor=40)
    finally:
        logging.disable(logging.NOTSET)
