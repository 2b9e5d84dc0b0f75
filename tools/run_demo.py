"""The main job end to end on generated data: train, evaluate every stage, predict, draw, export.

Every step is a command of the project that can be run alone; each is printed before it runs.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from d2dense.errors import ToolParser, UserError, run_tool

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "FSCascade/fscascade_tiny_shapes"
PICTURES = 12


def run(script, *arguments, quiet=True):
    """Run one of the project's scripts; quiet ones show their output only on failure."""
    words = [str(script), *map(str, arguments)]
    print("$ python " + shlex.join(words), flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if done.returncode:
        print(done.stdout or "", file=sys.stderr)
        raise UserError(f"{script} failed with exit code {done.returncode}; its output is above")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return done.stdout or ""


def stage_table(path):
    """Return the per-stage, per-IoU table of an evaluate_stages result as text."""
    results = json.loads(path.read_text())
    ious = [f"{0.5 + 0.05 * k:.2f}" for k in range(10)]
    lines = [f"{'AP at IoU':<20}" + "".join(f"{iou:>6}" for iou in ious) + f"{'mean':>7}"]
    for name, row in results.items():
        box = row["bbox"]
        values = "".join(f"{box[f'AP@{iou}']:6.1f}" for iou in ious)
        lines.append(f"{name:<20}{values}{box['AP']:7.2f}")
    return "\n".join(lines)


def main(argv=None):
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    args = parser.parse_args(argv)
    out, start = args.output.absolute(), time.perf_counter()
    # waiting threads sleep: spinning ones make a busy machine many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    data = Path(os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets")))
    run("tools/make_shapes.py", "--output", data / "shapes", "--if-missing")
    train = out / "train"
    run("tools/train_net.py", "--config-file", CONFIG, f"train.output_dir={train}", quiet=False)
    weights = train / "model_final.pth"
    model = ["--config-file", CONFIG, "--weights", weights]
    stages = out / "stages"
    run("projects/FSCascade/tools/evaluate_stages.py", *model, "--output", stages)
    figures = out / "figures"
    run("projects/FSCascade/tools/draw_figures.py", "--results", stages, "--output", figures)
    run("tools/plot_metrics.py", train, "--output", out / "curves.png")
    images = sorted((data / "shapes" / "images" / "val").glob("*.jpg"))[:PICTURES]
    run("tools/demo.py", *model, "--input", *images, "--output", out / "pictures")
    export = ["--format", "torchscript", "--method", "script", "--output", out / "exported"]
    exported = run("tools/export_model.py", *model, *export, "--evaluate")
    table = stage_table(stages / "results.json")
    print(f"\nAverage precision on shapes_val, each stage of one trained model:\n{table}")
    print(f"\nTorchScript file, {exported.splitlines()[-1].partition(', APs')[0]}\n")
    for what, where in {
        "weights, log, metrics": train,
        "evaluation by stage": stages,
        "the paper's figures": figures,
        "loss, lr and AP curves": out / "curves.png",
        "predictions drawn": out / "pictures",
        "TorchScript model": out / "exported",
    }.items():
        print(f"{what:<26}{where}")
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(run_tool(main))
