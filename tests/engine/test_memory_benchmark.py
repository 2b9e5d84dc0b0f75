"""The benchmark of memory levers on a small detector; its figures are those of fresh processes."""

from __future__ import annotations

import json
import sys

import pytest

from d2dense.engine import memory_benchmark


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_levers_save_memory_and_the_report_says_how_it_was_made(tmp_path):
    flags = ["--images", "4", "--size", "256", "320", "--device", "cpu", "--output", str(tmp_path)]
    memory_benchmark.main(["--config-file", "FSCascade/fscascade_tiny_shapes", *flags])
    report = json.loads((tmp_path / "memory_levers_cpu.json").read_text())
    peaks = {row["lever"]: row["peak MiB"] for row in report["rows"]}
    assert len(peaks) == 10
    for lever in ("activation checkpointing", "the batch in 2 parts", "sides of images halved"):
        assert peaks[lever] < 0.95 * peaks["none"], lever
    assert "--size 256 320" in report["command"]
    assert "FSCascade/fscascade_tiny_shapes" in report["title"]
