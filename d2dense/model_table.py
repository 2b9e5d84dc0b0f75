"""Which model to take: sizes, costs, what papers report, what is verified and how fast it is here.

Each project names its models in ``results.yaml``: a list of ``model``, ``size`` (height, width),
``paper`` (``metric``, ``value`` in percent, ``data``, ``where``), ``verified``, ``tests`` and,
where the benchmark measures the same network under another name, that name as ``timed``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from d2dense import config, costs, model_zoo, projects
from d2dense.benchmark import write_report
from d2dense.config.text import parse_yaml
from d2dense.export import adapt
from d2dense.layers import can_fold, fold_for_inference

__all__ = ["entries", "hollow", "latencies", "parameters", "row", "write_table"]

Row = dict[str, Any]

_aten = torch.ops.aten
# What takes the time of a forward pass; its results need not be right to be counted.
_SLOW = {
    *(_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm),
    *(_aten._softmax, _aten.gelu, torch.ops.torchvision.roi_align),
}
_NOTES = (
    "params: of what an image goes through; in training: with auxiliary heads and noised queries. "
    "Frozen batch norms have none.",
    "GMACs: multiply-accumulates of one image of that size, all convolutions and products of "
    "matrices; two-stage detectors see 1000 proposals and 100 masks.",
    "paper: what the authors report. No training at full size has been run here.",
    "verified: what tests of this repository compare; `results.yaml` of each project names the "
    "file.",
)


def entries() -> dict[str, Row]:
    """Return what the projects say of their models, by model-zoo name."""
    found = {}
    for project in projects.names():
        path = projects.config_folder(project).parent / "results.yaml"
        if path.is_file():
            for each in parse_yaml(path.read_text(encoding="utf-8")):
                found[f"{project}/{each['model']}"] = each
    return found


def latencies(folder: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds per image of models, by the report of ``make bench`` that has them."""
    found = {}
    for path in sorted(folder.glob("machine_*.json")):
        rows = json.loads(path.read_text())["rows"].get("Summary", [])
        found[path.stem] = {each["model"]: each["ms"] for each in rows if each.get("ms")}
    return found


class _Hollow(TorchDispatchMode):
    """What is slow gives zeros at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in _SLOW:
            return func(*args, **(kwargs or {}))
        shapes = tree_map_only(torch.Tensor, lambda each: each.to("meta"), (args, kwargs or {}))
        result = func(*shapes[0], **shapes[1])
        return torch.zeros_like(result, device=args[0].device)


@contextmanager
def hollow() -> Iterator[None]:
    """Skip what takes the time of a forward pass; shapes, and so costs, stay.

    Detectors cannot be counted on the meta device: how many boxes are left is a matter of values.
    """
    with _Hollow(), torch.no_grad():
        yield


def parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters that inference needs, and of the whole model."""
    return costs.count_parameters(_needed(model))[""], costs.count_parameters(model)[""]


def _needed(model: nn.Module) -> nn.Module:
    """Return what inference needs of a model, folded where that can be."""
    needed = adapt(model).model
    return fold_for_inference(copy.deepcopy(needed)) if can_fold(needed) else needed


def row(name: str, entry: Mapping[str, Any], known: Row | None = None) -> Row:
    """Return a model's row, without latencies.

    Args:
        known: an earlier one, whose costs stay where size and parameters are the same.
    """
    with torch.device("meta"):
        model = config.build_model(model_zoo.get_config(name), device="meta").eval()
    used, whole = parameters(model)
    size, paper = entry.get("size"), entry.get("paper")
    result = {
        "model": name,
        "params M": round(used / 1e6, 2),
        "in training": round(whole / 1e6, 2),
        "at": f"{size[0]} x {size[1]}" if size else "-",
    }
    if known is not None and result.items() <= known.items():
        result["GMACs"] = known["GMACs"]
    else:
        result["GMACs"] = round(_macs(name, model, size) / 1e9, 1) if size else "-"
    result["paper"] = _reported(paper) if paper else "-"
    result["verified"] = entry["verified"]
    return result


def _macs(name: str, model: nn.Module, size: Sequence[int]) -> int:
    """Return the multiply-accumulates of a model of the zoo, which is on the meta device."""
    adapter = adapt(_needed(model)).eval()
    if adapter.task != "detection":
        return costs.count_macs(adapter, torch.empty(3, *size, device="meta"))[""]
    model = config.build_model(model_zoo.get_config(name), device="cpu")
    with hollow():
        report = costs.analyze(model, tasks=["flops"], input_size=(size[0], size[1]))
    return report["macs"]


def _reported(paper: Mapping[str, Any]) -> str:
    value = paper["value"]
    numbers = ", ".join(map(str, value if isinstance(value, Sequence) else [value]))
    return f"{paper['metric']} {numbers} ({paper['data']}, {paper['where']})"


def write_table(path: Path, *, command: str, benchmarks: Path, recount: bool = False) -> str:
    """Write the table of all models to ``path``.json and ``path``.md; return the Markdown.

    Args:
        benchmarks: folder of the reports of ``make bench``.
        recount: count costs also of models that are in the table and have not changed.
    """
    known = {} if recount else {each["model"]: each for each in _read(path)}
    measured = latencies(benchmarks)
    rows = []
    for name, entry in entries().items():
        rows.append(row(name, entry, known.get(name)))
        for report, of_models in measured.items():
            timed = f"{name.split('/')[0]}/{entry['timed']}" if "timed" in entry else name
            ms = of_models.get(timed)
            rows[-1][f"ms, {report}"] = "not measured" if ms is None else f"{ms:.0f}"
        if not measured:
            rows[-1]["latency"] = "not measured"
    note = "ms: one image; the report in `benchmarks` names machine, date and size of images."
    return write_report(
        path, title="Pick a model", command=command, rows=rows, notes=[*_NOTES, note]
    )


def _read(path: Path) -> list[Row]:
    file = path.with_suffix(".json")
    return json.loads(file.read_text())["rows"] if file.is_file() else []
