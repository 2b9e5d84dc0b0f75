"""Every command of every page: run in a small form, or understood by its tool and run by the test
that is named here, or marked in the page as needing what a test has not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from d2dense import config
from tests.docs.commands import Command, check_configs, commands_of, parsed, tiny_config
from tests.docs.pages import ROOT, pages

# What other tests run: by a part of the command, the test that does.
ELSEWHERE = {
    "python tools/analysis_matrix.py": "tests/tools/test_analysis_matrix.py",
    "python tools/benchmark.py": "tests/tools/test_benchmark.py",
    "python tools/composition_matrix.py": "tests/composition/test_cells.py",
    "python tools/evaluate_exported.py": "tests/export/test_evaluate_exported.py",
    "python tools/export_matrix.py": "tests/export/test_matrix.py",
    "tools/analysis_matrix.py": "tests/tools/test_analysis_matrix.py",
    "tools/benchmark_data.py": "tests/data/test_speed_benchmark.py",
    "tools/convert_checkpoint.py --source cednet": "tests/projects/cednet/test_convert.py",
    "tools/convert_checkpoint.py --source codetr": "tests/projects/codetr/test_official.py",
    "tools/convert_labels.py": "tests/data/test_label_conversion.py",
    "tools/export_model.py": "tests/export/test_export_model.py",
    "tools/model_table.py": "tests/docs/test_models.py",
    "--num-gpus 2 --device cpu": "tests/tools/test_train_net.py",
    "d2dense.engine.memory_benchmark": "tests/engine/test_memory_benchmark.py",
    "d2dense.layers.deformable_benchmark": "tests/layers/test_deformable_ways.py",
    "projects/CEDNet/tools/benchmark.py": "tests/projects/cednet/test_speed.py",
    "projects/CEDNet/tools/fusion_time.py": "tests/projects/cednet/test_analyses.py",
    "projects/CEDNet/tools/input_gradients.py": "tests/projects/cednet/test_analyses.py",
    "projects/CEDNet/tools/quality_scores.py": "tests/projects/cednet/test_analyses.py",
    "projects/CoDETR/tools/benchmark.py": "tests/projects/codetr/test_benchmark.py",
    "projects/CoDETR/tools/discriminability.py": "tests/analyses/test_discriminability.py",
    "projects/CoDETR/tools/head_distance.py": "tests/analyses/test_head_distance.py",
    "projects/CoDETR/tools/instability.py": "tests/analyses/test_instability.py",
    "projects/CoDETR/tools/query_distance.py": "tests/analyses/test_query_distance.py",
    "projects/FSCascade/tools/draw_figures.py": "tests/projects/fscascade/test_tools.py",
    "projects/FSCascade/tools/evaluate_stages.py": "tests/projects/fscascade/test_tools.py",
    "projects/HFGD/tools/kernel_similarity.py": "tests/projects/hfgd/test_tools.py",
    "projects/HFGD/tools/label_maps.py": "tests/projects/hfgd/test_tools.py",
}
# Reports that a command wrote name the command of their day.
REPORTS = {path.with_suffix(".md") for path in ROOT.glob("benchmarks/*.json")}
ARCHITECTURE = ROOT / "docs" / "architecture.md"  # has a test of its own
COMMANDS = [
    command
    for page in pages()
    if page not in REPORTS and page != ARCHITECTURE
    for command in commands_of(page)
]
OURS = [command for command in COMMANDS if command.words[0] == "python"]


def is_run_here(command: Command) -> bool:
    return command.tool in SHRINK and not command.launched


def test_commands_are_found_in_every_kind_of_place():
    texts = [str(each) for each in COMMANDS]
    assert any("README.md" in text and "fscascade_r50" in text for text in texts)  # fenced
    assert any("HFGD/README.md" in text and "convert_labels" in text for text in texts)  # indented
    assert any("collect_env" in text for text in texts)  # in a line
    assert any("--source codetr" in text for text in texts)  # in a table
    assert len(OURS) > 40


@pytest.mark.parametrize("command", OURS, ids=str)
def test_its_tool_takes_it(command):
    check_configs(command, parsed(command))


@pytest.mark.parametrize("command", OURS, ids=str)
def test_it_is_run_or_says_why_not(command):
    if is_run_here(command) or command.marked:
        return
    tests = [test for part, test in ELSEWHERE.items() if part in " ".join(command.words)]
    assert tests, (
        f"{command}\nis run by no test: give it a small form in SHRINK, name the test that runs "
        "its tool in ELSEWHERE, or write beside it that it needs a GPU or needs the full data"
    )
    stem = command.tool.removesuffix(".py").replace("/", ".").rpartition(".")[2]
    assert stem in (ROOT / tests[0]).read_text(), f"{tests[0]} does not run {command.tool}"


def test_make_has_the_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in COMMANDS:
        if command.words[0] == "make":
            wanted = [each for each in command.words[1:] if "=" not in each]
            assert set(wanted) <= targets, str(command)


# ------------------------------------------------ small forms

# What the pages call the reader's own, and what it is here.
STAND_INS = {
    "my/train.json": "datasets/shapes/annotations/instances_train.json",
    "my/val.json": "datasets/shapes/annotations/instances_train.json",
    "my/images": "datasets/shapes/images/train",
    "my/labels": "datasets/shapes/semantic_train",
    "my/names.txt": "names.txt",
    "photos/*.jpg": "datasets/shapes/images/val/*.jpg",
    "photos": "datasets/shapes/images/val",
    "movie.mp4": "datasets/shapes/images/train",
}
WEIGHTS = re.compile(r"(\S+=)?(MODEL|(output/\S*/)?model_final\.pth)")


def with_stand_ins(command: Command, root: Path) -> list[str]:
    """The words of a command with small models and the generated data."""
    result, names = [], []
    for before, word in zip(("", *command.words), command.words):
        key, _, value = word.rpartition("=")
        if before == "--config-file" and not word.startswith("output/"):
            word = tiny_config(word)
            names.append(word)
        elif value in STAND_INS:
            word = f"{key}={STAND_INS[value]}" if key else STAND_INS[value]
        result.append(word)
    for index, word in enumerate(result):
        found = WEIGHTS.fullmatch(word)
        if found and names and not found[2].startswith("output/mine"):
            result[index] = f"{found[1] or ''}{weights_of(names[0], root)}"
    return result


def weights_of(name: str, root: Path) -> Path:
    """A checkpoint of a model as it is at the start."""
    path = root / f"{re.sub('[^a-z_]', '_', name.lower())}.pth"
    if not path.is_file():
        model = config.build_model(config.load(name), device="cpu")
        torch.save({"model": model.state_dict()}, path)
    return path


def train(words: list[str], root: Path) -> list[str]:
    """One step of two images, tests at small sizes."""
    if "--eval-only" in words:
        return [re.sub(r"min_sizes=.*", "min_sizes=[96,128]", word) for word in words]
    if any(word.endswith(".yaml") for word in words):
        small = "SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 0"
    else:
        small = "train.max_iter=1 dataloader.train.total_batch_size=2 train.eval_period=0"
    return [*words, *small.split()]


def study(words: list[str], root: Path) -> list[str]:
    """One model of one step in place of the study's."""
    name = "CEDNet/retinanet_resnet_tiny_shapes"
    small = {"train.max_iter": 1, "train.eval_period": 0, "dataloader.train.total_batch_size": 2}
    content = {
        "title": "One step",
        "metric": "bbox/AP",
        "seeds": [1],
        "input_size": [64, 64],
        "datasets": {"shapes": [f"{key}={value}" for key, value in small.items()]},
        "models": {"ResNet": {"config": name}},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(content))
    return [*words[:2], "study.yaml", "--runs", "output/study", "--output", "output/study.md"]


def unchanged(words: list[str], root: Path) -> list[str]:
    return words


SHRINK = {
    "tools/analyze_model.py": unchanged,
    "tools/check_dataset.py": unchanged,
    "tools/collect_env.py": unchanged,
    "tools/compare_training.py": study,
    "tools/demo.py": unchanged,
    "tools/plot_metrics.py": unchanged,
    "tools/print_config.py": unchanged,
    "tools/train_net.py": train,
    "tools/visualize_data.py": unchanged,
}


PROJECTS = sorted(path.name for path in ROOT.glob("projects/*/"))


@pytest.mark.parametrize("project", [None, *PROJECTS])
def test_small_forms_run(project, tmp_path):
    """Those of the general pages or of one project's, in their order, in one process and folder:
    later ones find what earlier ones wrote.
    """
    (tmp_path / "names.txt").write_text("\n".join(f"class {k}" for k in range(15)))
    make = (
        "python tools/make_shapes.py --output datasets/shapes --train 3 --val 1 --size 96 --crops"
    )
    lines = [[*make.split(), "--objects", "2", "4"]]
    for command in filter(is_run_here, OURS):
        place = command.page.parent
        if (place.name if place.parent.name == "projects" else None) != project:
            continue
        line = SHRINK[command.tool](with_stand_ins(command, tmp_path), tmp_path)
        if line not in lines:
            lines.append(line)
    for line in lines:
        line[1] = str(ROOT / line[1])
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "docs" / "run_commands.py", "commands.json"],
        cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": "datasets", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("\n$ ") == len(lines) - 1
