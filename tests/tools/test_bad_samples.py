"""Bad samples through the command line: a run with one goes on, one without a good one ends in a
line, and evaluation takes none.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2dense import checkpoint
from d2dense.engine.train_net import main
from d2dense.errors import run_tool

KEYS = {
    "yaml": ("DATASETS.CUSTOM.{}.IMAGES", "DATASETS.CUSTOM.{}.JSON", "DATALOADER.NUM_WORKERS"),
    "lazy": ("datasets.{}.images", "datasets.{}.json", "dataloader.train.num_workers"),
}


@pytest.fixture
def spoil(tmp_path, coco_set):
    """Copy the dataset; ``spoil(2)`` breaks the picture 2."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in Path(coco_set.images).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def spoil(*numbers: int) -> SimpleNamespace:
        for number in numbers:
            (folder / f"{number}.png").write_bytes(b"\x89PNG")
        return SimpleNamespace(images=str(folder), json=folder / "instances.json")

    return spoil


def keys(kind: str, slot: str) -> list[str]:
    slot = slot.upper() if kind == "yaml" else slot
    return [key.format(slot) for key in KEYS[kind]]


@pytest.mark.parametrize(("kind", "workers"), [("yaml", 0), ("lazy", 2)])
def test_training_goes_on_with_a_broken_file(tmp_path, configs, spoil, kind, workers):
    images, _, num_workers = keys(kind, "train")
    command = ["--config-file", configs[kind], images, spoil(2).images, num_workers, str(workers)]
    assert main(command) == 0
    out = tmp_path / f"out_{kind}"
    assert (out / "log.txt").read_text().count("cannot read image") == 1
    assert "2.png" in (out / "log.txt").read_text()
    assert checkpoint.read(out / "model_final.pth")["iteration"] == 3


@pytest.mark.parametrize("kind", KEYS)
def test_mistakes_in_data_are_one_line(configs, spoil, kind, capsys):
    def error_of(*arguments: str) -> str:
        capsys.readouterr()
        assert run_tool(lambda: main(["--config-file", configs[kind], *arguments])) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    data = spoil(*range(6))
    images, annotations, num_workers = keys(kind, "train")
    for workers in ("0", "2"):
        line = error_of(images, data.images, num_workers, workers)
        assert "DATALOADER.MAX_BAD_SHARE / dataloader.train.max_bad_share" in line
        assert ".png" in line
    # in evaluation, the first one
    assert "cannot read image" in error_of(keys(kind, "val")[0], data.images)

    content = json.loads(data.json.read_text())
    content["annotations"][3]["bbox"] = [1, 2, float("nan"), 4]
    data.json.write_text(json.dumps(content))
    line = error_of(annotations, str(data.json))
    assert "annotation 4 has bbox [1, 2, nan, 4]" in line
