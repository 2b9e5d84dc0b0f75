"""What a large annotation file costs: time until the first batch, and memory per loader worker and
per rank, measured in fresh processes.

Sizes are MiB from ``/proc/<pid>/smaps_rollup``. PSS counts a page that n processes map as 1/n in
each, so sums over processes count every page once; USS is what a process alone maps. Both leave out
the records' file, which is read and not mapped; its size is given apart.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from . import coco_format, datasets
from .loaders import build_train_loader, get_dataset_dicts
from .records import Records

__all__ = ["Case", "measure", "memory_of", "per_worker", "write_annotations"]

_NAME = "memory_benchmark"
_CLASSES = 80
_SIZES = np.array([[640, 480], [480, 640], [640, 427], [500, 375]])
_CHUNK = 100_000


def write_annotations(path: str | Path, *, images: int, boxes: int, seed: int = 0) -> None:
    """Write a COCO json with ``boxes`` boxes (no masks) spread over ``images`` images in random
    order; the same numbers give the same bytes.
    """
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        file.write('{"images": [')
        for start in range(0, images, _CHUNK):
            numbers = range(start, min(start + _CHUNK, images))
            sizes = _SIZES[rng.integers(len(_SIZES), size=len(numbers))].tolist()
            file.write(", " if start else "")
            file.write(
                ", ".join(
                    f'{{"id": {n}, "file_name": "{n:012d}.jpg", "width": {w}, "height": {h}}}'
                    for n, (w, h) in zip(numbers, sizes)
                )
            )
        file.write('], "annotations": [')
        for start in range(0, boxes, _CHUNK):
            count = min(_CHUNK, boxes - start)
            rows = zip(
                range(start, start + count),
                rng.integers(images, size=count).tolist(),
                rng.integers(1, _CLASSES + 1, size=count).tolist(),
                rng.uniform(1, 180, size=(count, 4)).round(2).tolist(),
            )
            file.write(", " if start else "")
            file.write(
                ", ".join(
                    f'{{"id": {n}, "image_id": {image}, "category_id": {category}, "bbox": {box}, '
                    f'"area": {box[2] * box[3]:.2f}, "iscrowd": 0}}'
                    for n, image, category, box in rows
                )
            )
        names = ", ".join(f'{{"id": {i}, "name": "class {i}"}}' for i in range(1, _CLASSES + 1))
        file.write(f'], "categories": [{names}]}}')


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of loading: processes, their workers, and how workers start.

    Attributes:
        in_process: every rank parses for itself, without a child process, for comparison.
    """

    ranks: int = 1
    workers: int = 0
    start_method: str | None = None
    in_process: bool = False


def measure(json_file: str, case: Case, *, batches: int = 200) -> list[dict[str, Any]]:
    """Run ``case`` in fresh processes and return one report per rank.

    Each rank loads the training set, draws ``batches`` batches of 16 without workers, then as many
    with them. Memory is looked at when all ranks are at the same point.

    Returns:
        Per rank ``load_s`` (until the records are there), ``first_batch_s`` (until the first batch,
        without workers), ``worker_start_s`` (until the first batch of the workers, from their
        start), ``before`` (memory before loading), ``alone`` (without workers), ``after`` (with
        workers), ``workers`` (memory of each), ``peak_mib`` (largest resident size of the rank),
        ``reader_peak_mib`` (the same of its children that ended: who parsed), ``parsed`` (how often
        the rank or its children parsed the file), ``records_mib`` (size of the records' file) and
        ``records``.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, nprocs=case.ranks, args=(json_file, case, batches, folder))
        reports = [Path(folder, f"{rank}.json").read_text() for rank in range(case.ranks)]
    return [json.loads(report) for report in reports]


def _rank(rank: int, json_file: str, case: Case, batches: int, folder: str) -> None:
    if case.ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=case.ranks
        )
    parsed = _count_parses(Path(folder, f"parsed{rank}"))
    spec = datasets.DatasetSpec(json=json_file, images=str(Path(json_file).parent))
    datasets.register(_NAME, spec)
    report: dict[str, Any] = {"before": memory_of(os.getpid())}
    start = time.perf_counter()
    if case.in_process:
        records = Records(coco_format.load_coco(json_file, spec.images))
    else:
        records = get_dataset_dicts(names=_NAME)
    report["load_s"] = time.perf_counter() - start
    report["records"], report["records_mib"] = len(records), records.nbytes / 2**20
    stream: Any
    stream, seconds = _draw(records, case, 0, batches)
    report["first_batch_s"] = report["load_s"] + seconds
    report["alone"] = memory_of(os.getpid())
    comm.synchronize()
    stream = None  # it holds the order of the images, as the next one will
    report["reader_peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    if case.workers:
        stream, report["worker_start_s"] = _draw(records, case, case.workers, batches)
    report["after"] = memory_of(os.getpid())
    report["workers"] = [memory_of(p.pid) for p in multiprocessing.active_children() if p.pid]
    del stream
    comm.synchronize()  # nobody ends, and leaves its shared pages to the others, before all looked
    report["peak_mib"] = _peak()
    report["parsed"] = parsed()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))


def _draw(
    records: Records, case: Case, workers: int, batches: int
) -> tuple[Iterator[list[dict]], float]:
    """Draw batches; return the stream, which keeps its workers, and the seconds until the first."""
    loader = build_train_loader(
        dataset=records,
        mapper=dict,
        total_batch_size=16 * case.ranks,
        num_workers=workers,
        seed=0,
    )
    if workers and case.start_method is not None:
        loader.multiprocessing_context = case.start_method
    start = time.perf_counter()
    stream = iter(loader)
    next(stream)
    seconds = time.perf_counter() - start
    for _ in itertools.islice(stream, batches):
        pass
    comm.synchronize()
    return stream, seconds


def _count_parses(log: Path) -> Callable[[], int]:
    """Note every parse of an annotation file, in this process and its children; return the
    count.
    """
    log.touch()
    parse = coco_format.read_json

    def noted(path):
        with open(log, "a") as file:
            file.write("x")
        return parse(path)

    coco_format.read_json = noted
    return lambda: log.stat().st_size


def _peak() -> float:
    """Return the largest resident size of this process; getrusage would include its parent's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def per_worker(reports: list[dict[str, Any]]) -> float:
    """Return what each worker adds to the PSS of all processes together, in MiB."""
    workers = [worker["pss"] for report in reports for worker in report["workers"]]
    added = sum(report["after"]["pss"] - report["alone"]["pss"] for report in reports)
    return (added + sum(workers)) / len(workers)


def memory_of(pid: int) -> dict[str, float]:
    """Return the ``pss`` and ``uss`` of a process in MiB."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, _ = line.split()
        fields[name[:-1]] = int(size) / 1024
    return {"pss": fields["Pss"], "uss": fields["Private_Clean"] + fields["Private_Dirty"]}
