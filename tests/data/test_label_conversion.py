"""Label maps written in other numbers, by the tool."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from d2dense.data.label_conversion import convert_folder
from d2dense.errors import UserError
from tests.commands import Command
from tools import convert_labels


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values], np.uint8)).save(path)


def read(path):
    return np.asarray(Image.open(path)).tolist()[0]


def test_there_and_back(tmp_path, capsys):
    write(tmp_path / "own" / "a.png", [0, 1, 59])
    write(tmp_path / "own" / "sub" / "b.png", [40, 0])
    (tmp_path / "own" / "notes.txt").write_text("no label map")
    folders = [str(tmp_path / name) for name in ("own", "classes", "back")]
    assert convert_labels.main(["--table", "pascal_context", *folders[:2]]) == 0
    assert "2 label maps in" in capsys.readouterr().out
    assert read(tmp_path / "classes" / "a.png") == [255, 0, 58]
    assert read(tmp_path / "classes" / "sub" / "b.png") == [39, 255]
    assert sorted(p.name for p in (tmp_path / "classes").rglob("*.*")) == ["a.png", "b.png"]
    assert convert_labels.main(["--table", "pascal_context", "--inverse", *folders[1:]]) == 0
    for name in ("a.png", "sub/b.png"):
        assert read(tmp_path / "back" / name) == read(tmp_path / "own" / name)


def test_train_ids_of_cityscapes_equal_the_official_ones(shared_data, tmp_path):
    folder = shared_data / "cityscapes_mini" / "gtFine" / "val"
    endings = ["--suffix", "_labelIds.png", "--new-suffix", "_labelTrainIds.png"]
    argv = ["--table", "cityscapes_label_ids", *endings, str(folder), str(tmp_path / "out")]
    assert convert_labels.main(argv) == 0
    official = sorted(folder.glob("*/*_labelTrainIds.png"))
    assert len(official) == 1
    for path in official:
        found = np.asarray(Image.open(tmp_path / "out" / path.relative_to(folder)))
        assert np.array_equal(found, np.asarray(Image.open(path)))


def test_ade20k_equals_the_converted_maps(shared_data, tmp_path):
    folder = shared_data / "ade20k_mini" / "ADEChallengeData2016"
    count = convert_folder(folder / "annotations", tmp_path, table="ade20k")
    written = sorted(tmp_path.rglob("*.png"))
    assert count == len(written) == 2
    for path in written:
        theirs = folder / "annotations_detectron2" / path.relative_to(tmp_path)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(theirs)))


def test_another_ignore_label_and_values_beyond_255(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"values": {"0": None, "1": 0, "2": 1}}))
    write(tmp_path / "own" / "a.png", [0, 1, 2])
    convert_folder(tmp_path / "own", tmp_path / "out", table=str(table), ignore_label=300)
    assert read(tmp_path / "out" / "a.png") == [300, 0, 1]
    options = {"table": str(table), "ignore_label": 300, "inverse": True}
    convert_folder(tmp_path / "out", tmp_path / "back", **options)
    assert read(tmp_path / "back" / "a.png") == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"a\.png has the value 60, which the label table 'pascal_context'"),
        ({"inverse": True}, r"a\.png has class 60.*0 to 58, and 255 is none"),
        ({"table": "pascal"}, "did you mean 'pascal_context'"),
        ({"suffix": "_labels.png"}, "no file in .* ends in '_labels.png'"),
        ({"target": "own"}, r"a\.png would be replaced"),
        ({"ignore_label": -1}, "ignore label -1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, words):
    write(tmp_path / "own" / "a.png", [3, 60])
    options = {"table": "pascal_context", "target": "out"} | options
    with pytest.raises(UserError, match=words):
        convert_folder(tmp_path / "own", tmp_path / options.pop("target"), **options)
    assert read(tmp_path / "own" / "a.png") == [3, 60]
    assert not list(tmp_path.glob("out/*"))


def test_the_tool_ends_with_code_2(repo_root, tmp_path):
    words = [repo_root / "tools" / "convert_labels.py", "--table", "pascal_context"]
    words += [tmp_path / "absent", tmp_path / "out"]
    log = tmp_path / "log"
    assert Command(words, log=log, environ=os.environ, cwd=tmp_path).wait() == 2
    assert "ends in '.png'" in log.read_text()
    assert "Traceback" not in log.read_text()
