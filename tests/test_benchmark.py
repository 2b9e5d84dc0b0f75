"""The timing helpers: fair order, ratios per round, MACs and memory of a known call."""

from __future__ import annotations

import json

import pytest
import torch

from d2dense import benchmark


def test_variants_take_turns_and_warmup_is_dropped():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = benchmark.interleaved(calls, rounds=2, warmup=1)
    assert "".join(order) == "abbaab"
    assert [len(values) for values in times.values()] == [2, 2]


def test_ratio_is_the_median_over_rounds():
    times = {"base": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 12.0]}
    assert benchmark.ratios(times, "base") == {"base": 1.0, "other": 2.0}


def test_macs_of_a_product_and_its_backward():
    a = torch.ones(4, 6, requires_grad=True)
    b = torch.ones(6, 8, requires_grad=True)
    assert benchmark.macs_of(lambda: a @ b) == 4 * 6 * 8
    assert benchmark.macs_of(lambda: (a @ b).sum().backward()) == 3 * 4 * 6 * 8


def test_a_comparison_divides_by_the_work_done(monkeypatch):
    seconds = {"base": [2.0, 4.0], "other": [3.0, 6.0]}
    monkeypatch.setattr(benchmark, "interleaved", lambda calls, rounds: seconds)
    monkeypatch.setattr(benchmark, "peak_memory", lambda call: call() * 2**20)
    calls = {"base": lambda: 10, "other": lambda: 40}
    settings = {"baseline": "base", "rounds": 2, "label": "what", "macs": {"base": 4, "other": 8}}
    _, other = benchmark.compare(calls, **settings)
    assert other == {
        "what": "other",
        "median s": 4.5,
        "min s": 3.0,
        "time ratio": 1.5,
        "MAC ratio": 2.0,
        "time / MAC ratio": 0.75,
        "GMAC": 8e-9,
        "peak MiB": 40,
        "memory / MAC ratio": 2.0,
    }
    base, other = benchmark.compare(calls, **settings, without_memory=["other"])
    assert (base["memory / MAC ratio"], other["memory / MAC ratio"]) == (1.0, None)
    assert "peak MiB" not in benchmark.compare(calls, **settings, without_memory=list(calls))[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the resident size of a CPU process")
def test_peak_memory_sees_an_allocation():
    size = 64 << 20
    # pages freed before the call must not hide what it needs
    freed = [torch.zeros(1 << 14, dtype=torch.uint8) for _ in range(8192)]
    del freed
    peak = benchmark.peak_memory(
        lambda: [torch.ones(1 << 14, dtype=torch.uint8) for _ in range(4096)]
    )
    assert size <= peak < 2 * size


def test_report_holds_machine_and_rows(tmp_path):
    rows = [{"variant": "a", "ratio": 1.5}]
    text = benchmark.write_report(
        tmp_path / "r", title="T", command="make bench", rows=rows, notes=["note"]
    )
    assert "1.500" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == rows
    assert {"date", "cores", "torch"} <= report["machine"].keys()
