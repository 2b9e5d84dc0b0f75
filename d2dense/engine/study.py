"""Comparisons of models trained in the same way from the same seeds, as a table and as curves.

A study is a yaml file::

    title: CEDNet against feature pyramids of equal cost
    metric: bbox/AP              # what evaluations log
    seeds: [1, 2, 3]
    input_size: [160, 160]       # of the multiply-accumulates in the table
    datasets:                    # name -> overrides of every model's config
      shapes: []
      cells: ["datasets.train.json=$DATA/train.json", "model.num_classes=3"]
    models:                      # name -> config and, if need be, overrides
      CEDNet: {config: CEDNet/retinanet_cednet_tiny_shapes}
      ResNet: {config: CEDNet/retinanet_resnet_tiny_shapes, overrides: ["optimizer.lr=0.001"]}

``$NAME`` in overrides is replaced by what the caller gives.
"""

from __future__ import annotations

import json
import statistics
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from d2dense import benchmark, config, costs
from d2dense.errors import UserError, nearest

from .curves import read_metrics

__all__ = ["Study", "draw_curves", "read_study", "run_study", "write_table"]

_TRAIN = (
    "import sys; from d2dense.engine.train_net import main; from d2dense.errors import run_tool; "
    "sys.exit(run_tool(main))"
)
_KEYS = ("title", "metric", "seeds", "input_size", "datasets", "models")


@dataclass(frozen=True)
class Run:
    """One training: a model on a dataset from a seed."""

    model: str
    dataset: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Study:
    """What a study file says; ``runs`` are all its trainings."""

    title: str
    metric: str
    input_size: tuple[int, int]
    runs: tuple[Run, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(run.dataset for run in self.runs))


def read_study(path: str | Path, *, output: str | Path, values: Mapping[str, str]) -> Study:
    """Read a study file.

    Args:
        output: folder of the runs, ``<output>/<dataset>/<model>/seed<n>``.
        values: what ``$NAME`` in the overrides stands for.

    Raises:
        UserError: no such file, keys or entries that are missing or unknown, a name without value.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the study {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"the study {path} is no mapping with the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"the study {path} has the unknown key {key!r}{nearest(key, _KEYS)}")
    for key in _KEYS:
        if not content.get(key):
            raise UserError(f"the study {path} lacks the key {key!r}")
    runs = []
    for dataset, common in content["datasets"].items():
        for model, entry in content["models"].items():
            if not isinstance(entry, dict) or "config" not in entry:
                raise UserError(f"model {model!r} of the study {path} needs 'config: NAME_OR_PATH'")
            overrides = _filled([*common, *entry.get("overrides", [])], values, path)
            for seed in content["seeds"]:
                folder = Path(output, _file_name(dataset), _file_name(model), f"seed{seed}")
                runs.append(Run(model, dataset, seed, entry["config"], overrides, folder))
    return Study(content["title"], content["metric"], tuple(content["input_size"]), tuple(runs))


def run_study(study: Study, *, jobs: int = 1) -> None:
    """Do all trainings that are not finished, ``jobs`` at a time; one that was stopped goes on.

    Raises:
        UserError: a training that failed; the others are done first. Its log is in its folder.
    """
    open_runs = [run for run in study.runs if not _is_finished(run, study.metric)]
    print(f"{len(study.runs)} trainings, {len(open_runs)} to do", flush=True)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        failed = [run for run, ok in zip(open_runs, pool.map(_train, open_runs)) if not ok]
    if failed:
        raise UserError(
            f"{len(failed)} trainings failed, see {failed[0].folder / 'output.txt'}; run the "
            "command again to go on"
        )


def write_table(study: Study, *, path: Path, command: str) -> None:
    """Write ``path`` (Markdown) and the same as ``.json``: per model its parameters, MACs, and the
    metric's mean, standard deviation over the seeds and single values.
    """
    results = _results(study)
    costs = {model: _costs(study, model) for model in study.models}
    rows = []
    for model in study.models:
        row: dict[str, Any] = {"model": model, **costs[model]}
        for dataset in study.datasets:
            values = list(results[dataset][model].values())
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[f"{dataset}"] = f"{statistics.mean(values):.1f} +- {spread:.1f}"
            row[f"{dataset}, each seed"] = ", ".join(f"{value:.1f}" for value in values)
        rows.append(row)
    report: dict[str, Any] = {
        "title": study.title,
        "metric": study.metric,
        "command": command,
        "machine": benchmark.machine(),
        "costs": costs,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    path.write_text(
        f"# {study.title}\n\n`{command}`\n\n{machine}\n\n{study.metric} at the end of training, "
        f"mean +- standard deviation over the seeds.\n\n{table}\n\n![curves]({path.stem}.png)\n"
    )


def draw_curves(study: Study, path: Path) -> None:
    """Draw the metric against the iteration: mean over the seeds, and the range between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(study.datasets), 3.8), layout="constrained")
    panels = figure.subplots(1, len(study.datasets), squeeze=False)[0]
    for panel, dataset in zip(panels, study.datasets):
        for model in study.models:
            runs = [r for r in study.runs if (r.model, r.dataset) == (model, dataset)]
            curves = [dict(zip(*read_metrics(run.folder)[study.metric])) for run in runs]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            (line,) = panel.plot(steps, [statistics.mean(v) for v in values], "o-", label=model)
            low, high = [min(v) for v in values], [max(v) for v in values]
            panel.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        panel.set_title(dataset)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(study.metric)
    panels[0].legend()
    figure.savefig(path, dpi=110)


def _train(run: Run) -> bool:
    """Train in a process of its own; whether it succeeded."""
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = [f"train.seed={run.seed}", f"train.output_dir={run.folder}"]
    command = ["--config-file", run.config, "--resume", *run.overrides, *settings]
    with open(run.folder / "output.txt", "w") as output:
        code = subprocess.run(
            [sys.executable, "-c", _TRAIN, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode
    print(f"{run.dataset}, {run.model}, seed {run.seed}: exit code {code}", flush=True)
    return code == 0


def _is_finished(run: Run, metric: str) -> bool:
    if not (run.folder / "model_final.pth").is_file():
        return False
    return metric in read_metrics(run.folder)


def _results(study: Study) -> dict[str, dict[str, dict[int, float]]]:
    """Return dataset -> model -> seed -> last value of the metric."""
    results: dict[str, dict[str, dict[int, float]]] = {}
    for run in study.runs:
        curves = read_metrics(run.folder)
        if study.metric not in curves:
            raise UserError(
                f"{run.folder} logged no {study.metric!r}{nearest(study.metric, sorted(curves))}"
            )
        model = results.setdefault(run.dataset, {}).setdefault(run.model, {})
        model[run.seed] = curves[study.metric][1][-1]
    return results


def _costs(study: Study, model: str) -> dict[str, str]:
    run = next(run for run in study.runs if run.model == model)
    built = config.build_model(config.load(run.config, run.overrides), device="cpu")
    report = costs.analyze(built, tasks=("params", "flops"), input_size=study.input_size)
    return {
        "M parameters": f"{report['params'] / 1e6:.3f}",
        "GMAC": f"{report['macs'] / 1e9:.4f}",
    }


def _filled(overrides: Sequence[str], values: Mapping[str, str], path: Path) -> tuple[str, ...]:
    try:
        return tuple(string.Template(each).substitute(values) for each in overrides)
    except KeyError as error:
        raise UserError(
            f"the study {path} needs a value for {error.args[0]!r}: add --set {error.args[0]}=VALUE"
        ) from None
    except ValueError as error:
        raise UserError(f"the study {path}: {error} in an override") from None


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())
