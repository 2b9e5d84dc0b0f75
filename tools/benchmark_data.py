#!/usr/bin/env python3
"""Measure what reading data costs: start-up and memory with a large annotation file, and training
samples per second.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2dense.benchmark import write_report
from d2dense.data import datasets, memory_benchmark, speed_benchmark
from d2dense.data.memory_benchmark import Case
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool

_CASES = {
    "1 rank": Case(workers=2),
    "2 ranks": Case(ranks=2, workers=1),
    "1 rank, workers spawned": Case(workers=2, start_method="spawn"),
    "1 rank, file parsed in the rank": Case(workers=2, in_process=True),
}
_NOTES = [
    "Memory: MiB. The json is generated: boxes without masks. A sample is a record without its"
    " picture, 16 in a batch. Ranks use gloo on one machine.",
    "load s: until the records are there; first batch s: from the same start, without workers;"
    " worker start s: from the start of the workers to their first batch.",
    "per worker: (PSS of all processes with w workers - PSS of all without) / w, each after the"
    " given number of batches. PSS shares a page out among the processes that map it.",
    "rank grows: memory (USS) of a rank after the batches without workers, less that before"
    " loading: mostly the shuffled order of the images. reader peak: largest resident size of the"
    " short-lived process that parses; rank peak: of a rank. records: size of the file in memory"
    " that all processes of the machine share; it is in none of the other figures.",
    "images/s: batches of 4, medians of turns, including the start of the workers. ms per image"
    " without workers; transfer is what a worker adds.",
]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("memory", "speed"), default=["memory", "speed"])
    add("--images", type=one_or_more, default=1_000_000, help="images of the large annotation file")
    add("--boxes", type=one_or_more, default=7_000_000, help="its boxes")
    add("--batches", type=one_or_more, default=200, help="batches drawn before memory is looked at")
    add("--json", metavar="F", help="COCO json of pictures for the speed; default: shapes_train")
    add("--pictures", metavar="DIR", help="folder of its pictures")
    add("--labels", metavar="DIR", help="label maps of the same names (.png), for semantic")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="for the speed")
    add("--samples", type=one_or_more, default=120, help="drawn per turn, for the speed")
    add("--output", default="benchmarks/data_loading", metavar="PATH", help="without suffix")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if bool(args.json) != bool(args.pictures) or (args.labels and not args.json):
        raise UserError("--json and --pictures go together, and --labels needs both")
    tables = {}
    if "memory" in args.parts:
        tables |= _memory(args)
    if "speed" in args.parts:
        tables |= _speed(args)
    given = sys.argv[1:] if argv is None else argv
    command = "tools/benchmark_data.py " + shlex.join(given)
    notes = [*_NOTES, f"Load average at the end: {os.getloadavg()[0]:.1f}, this command included."]
    title = "Reading data"
    print(write_report(Path(args.output), title=title, command=command, rows=tables, notes=notes))
    return 0


def _memory(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "big.json")
        memory_benchmark.write_annotations(path, images=args.images, boxes=args.boxes)
        for name, case in _CASES.items():
            reports = memory_benchmark.measure(str(path), case, batches=args.batches)
            rows.append({"case": name, **_summary(reports)})
        size = path.stat().st_size / 2**20
    about = f"{args.images} images, {args.boxes} boxes, json of {size:.0f} MiB"
    return {f"Start-up and memory: {about}, {args.batches} batches": rows}


def _summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    last = reports[-1]
    return {
        "load s": last["load_s"],
        "first batch s": last["first_batch_s"],
        "worker start s": last["worker_start_s"],
        "parsed": sum(report["parsed"] for report in reports),
        "per worker": memory_benchmark.per_worker(reports),
        "rank grows": last["alone"]["uss"] - last["before"]["uss"],
        "rank peak": last["peak_mib"],
        "reader peak": max(report["reader_peak_mib"] for report in reports),
        "records": last["records_mib"],
    }


def _speed(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    speed, time = [], []
    for recipe in speed_benchmark.RECIPES:
        records = datasets.load(_dataset(args, semantic=recipe == "semantic"))
        found = speed_benchmark.throughput(
            records, recipe, workers=args.workers, images=args.samples
        )
        speed.append({"recipe": recipe} | {f"{w} workers": v for w, v in found.items()})
        shares = speed_benchmark.shares(records, recipe, images=args.samples)
        whole = sum(shares.values())
        time += [
            {"recipe": recipe, "step": step, "ms per image": ms, "share": ms / whole}
            for step, ms in sorted(shares.items(), key=lambda item: -item[1])
        ]
    records = datasets.load(_dataset(args, semantic=False))
    ratio = speed_benchmark.compare_with_detectron2(records, images=args.samples)
    return {
        "Images per second": speed,
        "Copy-paste": [
            {"recipe": recipe, "time / without": ratio}
            for recipe, ratio in speed_benchmark.cost_of_pasting(
                records, images=args.samples
            ).items()
        ],
        "Against Detectron2": [{"recipe": "default", "time / DatasetMapper's": ratio}],
        "Where the time goes": time,
    }


def _dataset(args: argparse.Namespace, *, semantic: bool) -> str:
    if semantic and not args.labels:
        return "shapes_train_sem_seg"
    if not args.json:
        return "shapes_train"
    spec = {"json": args.json, "images": args.pictures}
    if semantic:
        names = tuple(str(number) for number in range(255))
        spec = {"images": args.pictures, "labels": args.labels, "classes": names}
    datasets.register("benchmark", datasets.DatasetSpec(**spec))
    return "benchmark"


if __name__ == "__main__":
    sys.exit(run_tool(main))
