"""Fair timings on shared, noisy machines: variants take turns in one process and are compared as
ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "add_flags",
    "compare",
    "interleaved",
    "machine",
    "macs_of",
    "peak_memory",
    "process_memory",
    "ratios",
    "restart_process_peak",
    "write_report",
]

Name = TypeVar("Name", bound=Hashable)  # of what is compared; tables need strings


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[Name, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[Name, list[float]]:
    """Run every variant once per round, in an order that turns around each round, and return
    seconds per call.

    A slow spell of the machine then hits neighbours in the same round, not one variant in all of
    its rounds.
    """
    names = list(variants)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in names if index % 2 == 0 else reversed(names):
            _synchronize()
            start = time.perf_counter()
            variants[name]()
            _synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[Name, list[float]], baseline: Name) -> dict[Name, float]:
    """Return each variant's median, over rounds, of its time divided by the baseline's in the same
    round.
    """
    base = times[baseline]
    return {
        name: statistics.median(a / b for a, b in zip(values, base))
        for name, values in times.items()
    }


def compare(
    calls: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int,
    label: str,
    macs: Mapping[str, int] | None = None,
    without_memory: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return a table row per call: time, multiply-accumulates and peak memory, and their ratios to
    the baseline's.

    Args:
        calls: by name, the baseline's among them.
        label: heading of the names.
        macs: of each call; None counts them.
        without_memory: calls whose memory is not measured, such as those that cannot run in a
            forked process. The rows have no memory at all where these are all calls.
    """
    macs = macs or {name: macs_of(call) for name, call in calls.items()}
    memory = {name: peak_memory(call) for name, call in calls.items() if name not in without_memory}
    times = interleaved(calls, rounds=rounds)
    time_ratios = ratios(times, baseline)
    rows = []
    for name in calls:
        mac_ratio = macs[name] / macs[baseline]
        row = {
            label: name,
            "median s": statistics.median(times[name]),
            "min s": min(times[name]),
            "time ratio": time_ratios[name],
            "MAC ratio": mac_ratio,
            "time / MAC ratio": time_ratios[name] / mac_ratio,
            "GMAC": macs[name] / 1e9,
        }
        if memory:
            known = name in memory
            row["peak MiB"] = memory[name] / 2**20 if known else None
            row["memory / MAC ratio"] = (
                memory[name] / memory[baseline] / mac_ratio if known else None
            )
        rows.append(row)
    return rows


def macs_of(call: Callable[[], Any]) -> int:
    """Return the multiply-accumulates of ``call``, the backward pass included where it runs one."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def peak_memory(call: Callable[[], Any], *, forked: bool = True) -> int:
    """Return the bytes that ``call`` needs on top of what is in use before it.

    On CUDA from the allocator; on the CPU (Linux) from a process's largest resident size.

    Args:
        forked: on the CPU, call it in a forked process, which leaves this one as it is and computes
            on one thread; else here, with all threads.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not forked:
        return _resident_peak(call)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # the thread pool does not survive a fork, so the child computes on one thread
            torch.set_num_threads(1)
            gc.freeze()  # a look through all that is there already would copy its pages
            os.write(write, str(_resident_peak(call)).encode())
        except BaseException:
            traceback.print_exc()  # it must not return into the parent's program
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the measured call failed in the child process")
    return int(text)


def _resident_peak(call: Callable[[], Any]) -> int:
    restart_process_peak()
    before = process_memory("VmRSS")
    call()
    return process_memory("VmHWM") - before


def restart_process_peak() -> None:
    """Let this process's ``VmHWM`` start again at its present size.

    Freed heap pages go back first, or what follows would fill those and seem to need nothing.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM at the present size


def process_memory(field: str) -> int:
    """Return ``VmRSS``, ``VmHWM`` or another size of this process (Linux), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, one of those that are here, and ``--output``, the folder of the report."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="DIR")


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: device, cores, threads, versions, date."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_report(
    path: Path,
    *,
    title: str,
    command: str,
    rows: list[dict[str, Any]] | dict[str, list[dict[str, Any]]],
    notes: list[str],
    **more: Any,
) -> str:
    """Write ``path``.json and ``path``.md (machine, command, tables, notes) and return the
    Markdown.

    Args:
        rows: of one table, or of several by their headings.
        **more: what only the json gets.
    """
    about = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"title": title, "command": command, "machine": about, "rows": rows, "notes": notes}
    report |= more
    _replace(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in about.items())
    tables = []
    for heading, lines in rows.items() if isinstance(rows, dict) else [("", rows)]:
        tables += [f"## {heading}"] * bool(heading)
        tables.append(tabulate(lines, headers="keys", tablefmt="github", floatfmt=".3f"))
    text = "\n\n".join(
        [f"# {title}", f"`{command}`", where, *tables, *(f"- {note}" for note in notes)]
    )
    _replace(path.with_suffix(".md"), text + "\n")
    return text


def _replace(path: Path, text: str) -> None:
    """Write a file so that there is always a whole one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
