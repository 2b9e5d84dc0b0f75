#!/usr/bin/env python3
"""Run every analysis command on a small model of every family, with random weights and generated
pictures, and write what works and what is refused as a table (OUTPUT.json and OUTPUT.md).

The exit code is 1 if a command fails in any other way than by a refusal, or leaves out its picture,
its table or its summary.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from d2dense import benchmark, config, model_zoo
from d2dense.data import shapes
from d2dense.errors import ToolParser, UserError, nearest, one_or_more, run_tool

ROOT = Path(__file__).resolve().parents[1]
WORKS, REFUSED, DEFECT = "works", "refused", "DEFECT"
OVERVIEW, REFUSALS = "What works, in seconds", "Refusals"


@dataclass(frozen=True)
class Analysis:
    """
    Attributes:
        figure: what it draws, and of which paper
        command: of a project
        flags: besides model, weights, data and output
        weights: how many random ones it takes; none: it computes no model
        models: how many models, otherwise all weights are of one
        data: whether it takes images
        then: command that draws from the results of the first
    """

    figure: str
    command: str
    flags: tuple[str, ...] = ()
    weights: int = 1
    models: int = 1
    data: bool = True
    then: str = ""


ANALYSES = {
    "fusion time": Analysis(
        "CEDNet, section 3: share of parameters before the first fusion",
        "projects/CEDNet/tools/fusion_time.py",
        weights=0,
        data=False,
    ),
    "quality": Analysis(
        "CEDNet, appendix B: image ranking by detection quality, panels",
        "projects/CEDNet/tools/quality_scores.py",
        weights=2,
        models=2,
    ),
    "input gradients": Analysis(
        "CEDNet, appendix B: gradient maps, area over threshold",
        "projects/CEDNet/tools/input_gradients.py",
    ),
    "encoder scores": Analysis(
        "Co-DETR, IoF-IoB curves and score maps of encoder features",
        "projects/CoDETR/tools/discriminability.py",
    ),
    "attention scores": Analysis(
        "Co-DETR, the same of the decoder's cross attention",
        "projects/CoDETR/tools/discriminability.py",
        ("--source", "cross-attention"),
    ),
    "instability": Analysis(
        "Co-DETR, matching instability from checkpoint to checkpoint",
        "projects/CoDETR/tools/instability.py",
        weights=2,
    ),
    "head distance": Analysis(
        "Co-DETR, distance of heads by class activation maps",
        "projects/CoDETR/tools/head_distance.py",
    ),
    "query distance": Analysis(
        "Co-DETR, distances of queries to customised positives",
        "projects/CoDETR/tools/query_distance.py",
    ),
    "stages": Analysis(
        "FSCascade, figures 1, 3, 4 and 5: AP by stage and IoU, confidence",
        "projects/FSCascade/tools/evaluate_stages.py",
        then="projects/FSCascade/tools/draw_figures.py",
    ),
    "kernel similarity": Analysis(
        "HFGD, similarity of class kernels",
        "projects/HFGD/tools/kernel_similarity.py",
        data=False,
    ),
    "label maps": Analysis(
        "HFGD, label maps side by side",
        "projects/HFGD/tools/label_maps.py",
    ),
}


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        model: name in the model zoo
        kind: of its config
        overrides: that make it small
        labels: whether its data are label maps
    """

    model: str
    kind: str = "lazy"
    overrides: tuple[str, ...] = ()
    labels: bool = False


_SMALL_C5 = (
    "model.num_classes=10",
    "model.encoder.layers=1",
    "model.decoder.layers=2",
    "dataloader.test.mapper.augmentations.min_size=[128]",
    "dataloader.test.mapper.augmentations.max_size=128",
    "dataloader.test.num_workers=0",
)
FAMILIES = {
    "RetinaNet": Family("CEDNet/retinanet_cednet_tiny_shapes", "yaml"),
    "Faster R-CNN": Family("FSCascade/faster_rcnn_tiny_shapes"),
    "Mask R-CNN": Family("CEDNet/mask_rcnn_cednet_tiny_shapes", "yaml"),
    "Cascade R-CNN": Family("FSCascade/cascade_rcnn_tiny_shapes", "yaml"),
    "Cascade Mask R-CNN": Family("CEDNet/cascade_mask_rcnn_cednet_tiny_shapes"),
    "FSCascade": Family("FSCascade/fscascade_mask_tiny_shapes"),
    "Deformable DETR": Family("CEDNet/deformable_detr_cednet_tiny_shapes", "yaml"),
    "Deformable DETR++": Family("CoDETR/deformable_detr_tiny_shapes"),
    "DINO": Family("CoDETR/dino_tiny_shapes"),
    "Co-Deformable DETR": Family("CoDETR/co_deformable_detr_tiny_shapes"),
    "Co-DINO": Family("CoDETR/co_dino_tiny_shapes", "yaml"),
    "Conditional DETR, ATSS": Family("CoDETR/conditional_detr_r50_c5_atss_3x", overrides=_SMALL_C5),
    "DAB-DETR, ATSS": Family("CoDETR/dab_detr_r50_c5_atss_3x", overrides=_SMALL_C5),
    "Mask2Former": Family("CEDNet/mask2former_cednet_tiny_shapes"),
    "SemanticFPN": Family("HFGD/semantic_fpn_tiny_shapes", labels=True),
    "UperNet": Family("CEDNet/upernet_cednet_tiny_shapes", "yaml", labels=True),
    "HFGD": Family("HFGD/hfgd_tiny_shapes", "yaml", labels=True),
    "classifier": Family("CEDNet/classifier_cednet_tiny_objects", labels=True),
}


class Bench:
    """Generated pictures and random weights in a folder.

    Args:
        images: how many
        size: their side in pixels
    """

    def __init__(self, folder: Path, *, images: int, size: int):
        self.folder, self.images, self.size = folder, images, size

    @cached_property
    def data(self) -> dict[bool, list[str]]:
        """The flags that name objects (False) and label maps (True)."""
        root = self.folder / "shapes"
        shapes.generate(output_dir=root, split="val", count=self.images, size=self.size, seed=0)
        names = root / "classes.txt"
        names.write_text("\n".join(shapes.SEMANTIC_CLASSES) + "\n")
        pictures = ["--images", str(root / "images" / "val")]
        objects = ["--json", str(root / "annotations" / "instances_val.json")]
        labels = ["--labels", str(root / "semantic_val"), "--classes", str(names)]
        return {False: [*objects, *pictures], True: [*labels, *pictures]}

    def weights(self, family: Family, seed: int) -> str:
        """Return a file of the family's weights, drawn from a seed."""
        file = self.folder / f"{family.model.replace('/', '_')}_{seed}.pth"
        if not file.exists():
            cfg = config.load(self.config_file(family), family.overrides)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = config.build_model(cfg, device="cpu")
            torch.save({"model": model.state_dict()}, file)
        return str(file)

    @staticmethod
    def config_file(family: Family) -> str:
        return str(model_zoo.get_config_file(family.model, family.kind))

    def command_line(self, analysis: Analysis, family: Family, output: Path) -> list[str]:
        """Return the arguments of an analysis of a family."""
        line = [*("--config-file", self.config_file(family)) * analysis.models]
        files = [self.weights(family, seed) for seed in range(analysis.weights)]
        if analysis.models > 1:
            line += [word for file in files for word in ("--weights", file)]
        elif files:
            line += ["--weights", *files]
        if analysis.weights:
            line += ["--device", "cpu"]
        if analysis.data:
            line += self.data[family.labels]
        return [*line, *analysis.flags, "--output", str(output), *family.overrides]


def main_of(command: str) -> Callable[[Sequence[str]], int]:
    """Return the ``main`` of a command."""
    spec = importlib.util.spec_from_file_location(Path(command).stem, ROOT / command)
    assert spec is not None  # every .py file has one, with a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run_cell(bench: Bench, analysis: Analysis, family: Family) -> dict[str, Any]:
    """Return ``result``, ``seconds`` of CPU time, ``files``, and in ``words`` why it fails."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        output = Path(folder)
        line = bench.command_line(analysis, family, output)
        start = time.process_time()
        result, words = WORKS, ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main_of(analysis.command)(line)
                if analysis.then:
                    results = ["--results", f"model={output}", "--output", str(output / "figures")]
                    main_of(analysis.then)(results)
        except UserError as error:
            result, words = REFUSED, str(error)
        except Exception as error:
            result, words = DEFECT, f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        files = sorted(str(f.relative_to(output)) for f in output.rglob("*") if f.is_file())
    if result == WORKS:
        missing = {".png", ".csv", ".json"} - {Path(file).suffix for file in files}
        if missing:
            result, words = DEFECT, f"wrote no {' and no '.join(sorted(missing))} but {files}"
    return {"result": result, "seconds": seconds, "files": files, "words": words}


def tables(
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Return seconds by model and analysis, what each command draws, and refusals with their
    models.

    Args:
        cells: by name of the analysis and of the family
    """
    analyses = list(dict.fromkeys(analysis for analysis, _ in cells))
    families = list(dict.fromkeys(family for _, family in cells))
    return {
        OVERVIEW: [
            {
                "model": family,
                "config": f"{FAMILIES[family].model} ({FAMILIES[family].kind})",
                **{analysis: _mark(cells[analysis, family]) for analysis in analyses},
            }
            for family in families
        ],
        "Commands": [
            {
                "analysis": name,
                "draws": ANALYSES[name].figure,
                "command": _shown(ANALYSES[name]),
                "writes": _longest([cells[name, f] for f in families]),
            }
            for name in analyses
        ],
        REFUSALS: [
            {"analysis": analysis, "models": "; ".join(models), "words": words}
            for (analysis, words), models in _refusals(cells).items()
        ],
    }


def _mark(cell: Mapping[str, Any]) -> str:
    marks = {WORKS: f"{cell['seconds']:.1f}", REFUSED: "-", DEFECT: DEFECT}
    return marks[cell["result"]]


def _shown(analysis: Analysis) -> str:
    then = f", then {Path(analysis.then).name}" if analysis.then else ""
    return " ".join([analysis.command, *analysis.flags]) + then


def _longest(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the files of the model of which there are most."""
    written: list[list[str]] = [cell["files"] for cell in cells if cell["result"] == WORKS]
    longest: list[str] = max(written, key=len, default=[])
    return ", ".join(longest)


def _refusals(
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[tuple[str, str], list[str]]:
    """Return the models by analysis and words, with CONFIG for the config's file."""
    found: dict[tuple[str, str], list[str]] = {}
    for (analysis, family), cell in cells.items():
        if cell["result"] == REFUSED:
            words = cell["words"].replace(Bench.config_file(FAMILIES[family]), "CONFIG")
            found.setdefault((analysis, words), []).append(family)
    return found


def chosen(names: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return the names, or all if none is given.

    Raises:
        UserError: an unknown one.
    """
    for name in names:
        if name not in known:
            raise UserError(f"unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return list(names) or list(known)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("docs/analyses"), help="without ending")
    add("--analysis", action="append", default=[], metavar="NAME", help="only these; by name")
    add("--family", action="append", default=[], metavar="NAME", help="only these; by name")
    add("--images", type=one_or_more, default=1, help="generated pictures")
    add("--size", type=one_or_more, default=96, help="their side in pixels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    analyses, families = chosen(args.analysis, ANALYSES), chosen(args.family, FAMILIES)
    logging.disable(logging.WARNING)
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), images=args.images, size=args.size)
        for family in families:
            for analysis in analyses:
                cell = run_cell(bench, ANALYSES[analysis], FAMILIES[family])
                cells[analysis, family] = cell
                print(
                    f"{family:24}{analysis:18}{cell['result']:9}{cell['seconds']:6.1f} s",
                    flush=True,
                )
    logging.disable(logging.NOTSET)
    benchmark.write_report(
        args.output,
        title="Analyses of the papers on every family of models",
        command="python tools/analysis_matrix.py --output docs/analyses",
        rows=tables(cells),
        notes=[
            f"Generated pictures ({args.images}) of {args.size} x {args.size} pixels, weights "
            "drawn at random: this says what runs, not what a trained model shows.",
            "A dash is a refusal in one line, which stands in the last table.",
            "Seconds of CPU time, reading config and weights included.",
        ],
    )
    defects = [key for key, cell in cells.items() if cell["result"] == DEFECT]
    for analysis, family in defects:
        print(f"{analysis} of {family}: {cells[analysis, family]['words']}", file=sys.stderr)
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
