"""What can be exported how: every model of the model zoo by every way, tried and checked."""

from __future__ import annotations

import datetime
import fnmatch
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import Tensor, nn

from d2dense import config
from d2dense.benchmark import write_report
from d2dense.errors import UserError

from .adapters import adapt, largest_side
from .formats import FORMATS
from .reduction import reduced, structure
from .support import WAYS, refusal
from .torchscript import quiet
from .untrained import spread_outputs
from .verification import FreshServer, check_images, verify

__all__ = ["Matrix", "rows_of"]

logger = logging.getLogger(__name__)

_TITLE = "What can be exported how"
# Height and width of the picture that models see; the check sees others.
_SIZE = (96, 128)
_NOTES = [
    "A figure is the largest error of any output value of the file, run in a fresh process without "
    "this project, at two other image sizes and on a pale image, against the model; relative "
    "where values are above 1. Weights are random, the last layers scaled so that scores and boxes "
    "differ. Pictures are small, those of full-size models too.",
    "Reduced: one or two blocks or layers of each kind, by d2dense.export.reduction. Models that "
    "differ only in what training reads, in their number of classes or, reduced, in their depth "
    "and the width of their backbone are one model then, tried once.",
]
_UNTRIED = "not tried yet"


def rows_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return by structure what is exported of these models: their ``names`` and the reduced
    ``cfg`` of the first.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        cfg = config.load(name)
        # a yaml config has no parameters that can be reduced alike; the model is itself
        cfg, key = (reduced(cfg), "") if isinstance(cfg, DictConfig) else (cfg, name)
        row = rows.setdefault(key or structure(cfg), {"names": [], "cfg": cfg})
        row["names"].append(name)
    return rows


class Matrix:
    """Results so far, kept in a file, so that a run that was stopped goes on.

    Args:
        path: of the report, without suffix.
        command: that is written into it.
    """

    def __init__(self, path: Path, *, command: str):
        self.path, self.command = path, command
        self.results: dict[str, dict[str, Any]] = {}
        if path.with_suffix(".json").is_file():
            content = json.loads(path.with_suffix(".json").read_text())
            self.results = content.get("results", {})

    def run(
        self,
        rows: dict[str, dict[str, Any]],
        *,
        full: Sequence[str] = (),
        only: str = "*",
        ways: Sequence[str] = WAYS,
        seconds: float | None = None,
    ) -> None:
        """Try every cell that has no result yet, or failed; write the report after every row.

        Args:
            rows: all models, see :func:`rows_of`.
            full: names that are tried in full size too.
            only: rows with a name that this pattern fits.
            ways: some of :data:`~d2dense.export.support.WAYS`.
            seconds: start no further row after these.
        """
        unknown = set(full) - {name for row in rows.values() for name in row["names"]}
        if unknown:
            raise UserError(f"--full {sorted(unknown)[0]}: no such model in the model zoo")
        start = time.perf_counter()
        with FreshServer() as server:
            for key, names, cfg in _tasks(rows, full):
                if not fnmatch.filter(names, only):
                    continue
                late = seconds is not None and time.perf_counter() - start > seconds
                cells = self.results.setdefault(key, {"cells": {}})["cells"]
                missing = [w for w in ways if "error" not in cells.get(w, {})]
                missing = [w for w in missing if "refusal" not in cells.get(w, {})]
                if missing and not late:
                    logger.info("%s: %s", names[0], ", ".join(missing))
                    for way, cell in _try(cfg or config.load(names[0]), missing, server):
                        cells[way] = cell
                        self.write(rows)
        self.write(rows)

    def write(self, rows: dict[str, dict[str, Any]]) -> str:
        """Write the report of these rows and return its Markdown; results of models that are no
        more are dropped.
        """
        names = {key: row["names"] for key, row in rows.items()}
        names |= {f"full {name}": [name] for row in rows.values() for name in row["names"]}
        self.results = {key: each for key, each in self.results.items() if key in names}
        for key, each in self.results.items():
            each["names"] = names[key]
        reasons: dict[str, int] = {}
        tables: dict[str, list[dict[str, Any]]] = {}
        command = self.command
        for key, row in rows.items():
            for name in row["names"]:
                project = name.split("/")[0]
                line = self._row(key, name, reasons)
                line["tried with"] = "" if name == row["names"][0] else row["names"][0]
                tables.setdefault(f"{project}, reduced", []).append(line)
        for lines in tables.values():
            lines.sort(key=lambda line: line["model"])
        full = sorted(key for key in self.results if key.startswith("full "))
        if full:
            tables["Full size"] = [self._full_row(key, reasons) for key in full]
            command = " ".join([command, "--full", *(name for key in full for name in names[key])])
        notes = [*_NOTES, *(f"[{number}] {reason}" for reason, number in reasons.items())]
        text = write_report(self.path, title=_TITLE, command=command, rows=tables, notes=notes)
        file = self.path.with_suffix(".json")
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "results": self.results}, indent=1) + "\n"
        )
        return text

    def _row(self, key: str, name: str, reasons: dict[str, int]) -> dict[str, Any]:
        cells = self.results.get(key, {}).get("cells", {})
        return {"model": name} | {way: _shown(cells.get(way), reasons) for way in WAYS}

    def _full_row(self, key: str, reasons: dict[str, int]) -> dict[str, Any]:
        row = self._row(key, self.results[key]["names"][0], reasons)
        for way, cell in self.results[key]["cells"].items():
            if "error" in cell:
                row[way] += f", {cell['bytes'] / 2**20:.0f} MiB, {cell['seconds']:.0f} s"
        return row


def _tasks(
    rows: dict[str, dict[str, Any]], full: Sequence[str]
) -> list[tuple[str, list[str], CfgNode | DictConfig | None]]:
    """Return key, names and config, None where it is loaded when its turn comes, of all rows."""
    small = [(key, row["names"], row["cfg"]) for key, row in rows.items()]
    # tiny models first: they need seconds
    small.sort(key=lambda task: not any("tiny" in name for name in task[1]))
    return [*((f"full {name}", [name], None) for name in full), *small]


def _try(
    cfg: CfgNode | DictConfig, ways: Sequence[str], server: FreshServer
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each way with ``error``, ``found``, ``bytes`` and ``seconds`` of an export that works,
    ``refusal`` of one that is refused, ``failure`` otherwise.
    """
    torch.manual_seed(0)
    image = _picture()
    date = {"date": datetime.date.today().isoformat()}
    try:
        model = config.build_model(cfg, device="cpu").eval()
        if refusal(model, "torchscript") is None:
            spread_outputs(model, image)
    except UserError as error:
        for way in ways:
            yield way, {"failure": f"the model cannot be built: {error}", **date}
        return
    for way in ways:
        format, method = (way, "trace") if way in FORMATS else ("torchscript", way)
        reason = refusal(model, format, method)
        if reason is not None:
            yield way, {"refusal": reason, **date}
            continue
        try:
            yield way, {**_export(model, image, format, method, server), **date}
        except Exception as error:  # of exporters, anything; the table says which
            logger.debug("%s failed", way, exc_info=True)
            lines = str(error).strip().splitlines()
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            yield way, {"failure": f"{kind}{lines[0] if lines else 'no message'}"[:300], **date}


def _export(
    model: nn.Module, image: Tensor, format: str, method: str, server: FreshServer
) -> dict[str, Any]:
    adapter = adapt(model).eval()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="d2dense_matrix_") as folder, quiet():
        path = Path(folder, FORMATS[format].file_name)
        FORMATS[format].save(adapter.model, image, path, method=method)
        images = check_images(image, largest=largest_side(adapter.model))
        checks = verify(path, adapter, images, server=server)
        return {
            "error": max(check.error for check in checks),
            "found": max(check.found for check in checks),
            "bytes": path.stat().st_size,
            "seconds": round(time.perf_counter() - start, 2),
        }


def _picture() -> Tensor:
    """Return smooth random colours ``(3, H, W)``, uint8."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 3, 7, 9, generator=generator) * 255
    picture = nn.functional.interpolate(blocks, _SIZE, mode="bilinear")[0]
    return picture.round().to(torch.uint8)


def _shown(cell: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    """Return a cell of the table; reasons are numbered in the order they come up."""
    if cell is None:
        return _UNTRIED
    if "error" in cell:
        return f"ok, {cell['error']:.0e}"
    reason = cell.get("refusal") or cell["failure"]
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"refused [{number}]" if "refusal" in cell else f"fails [{number}]"
