"""Checkpoints of a run: retention, the tag, and what is resumed after damage."""

from __future__ import annotations

import json
import os

import pytest
import torch

from d2dense.checkpoint import CheckpointFolder
from d2dense.errors import UserError
from tests.checkpoint.folders import content, cut, filled, name, resumed, weights

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# ---- names and retention


def test_names_tags_and_retention(tmp_path):
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    assert folder.last() is None
    assert folder.resume() is None
    assert not folder.has_own()
    folder = filled(tmp_path / "run", keep=2)
    folder.save("model_best", content(150), tag=False)
    assert folder.last().name == name(299)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == name(299)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoints.json",
        "last_checkpoint",
        name(199),
        name(299),
        "model_best.pth",
    ]
    listed = json.loads((tmp_path / "run" / "checkpoints.json").read_text())["files"]
    assert [(each["name"], each["iteration"]) for each in listed] == [
        (name(199), 199),
        (name(299), 299),
        ("model_best.pth", 150),
    ]
    for each in listed:
        assert each["size"] == (tmp_path / "run" / each["name"]).stat().st_size


def test_retention_goes_on_after_resume(tmp_path):
    filled(tmp_path, keep=2)
    again = CheckpointFolder(tmp_path, keep=2)
    path, state = again.resume()
    again.adopt(path, until=state["iteration"])
    again.save_periodic(399, content(399))
    assert weights(tmp_path) == {name(299), name(399)}
    again.save_periodic(399, content(399))  # once more: still one file
    assert weights(tmp_path) == {name(299), name(399)}
    again.save("model_final", content(400))
    assert weights(tmp_path) == {name(299), name(399), "model_final.pth"}
    assert again.last().name == "model_final.pth"


def test_going_back_drops_what_came_after(tmp_path):
    """A user puts the tag back; the run saves at other iterations than before."""
    filled(tmp_path, keep=4)
    (tmp_path / "last_checkpoint").write_text(name(99) + "\n")
    folder = CheckpointFolder(tmp_path, keep=4)
    path, state = folder.resume()
    assert state["iteration"] == 99
    folder.adopt(path, until=99)
    folder.save_periodic(249, content(249))
    # 199 has been passed, 299 not yet
    assert weights(tmp_path) == {name(99), name(249), name(299)}
    cut(tmp_path / name(249))
    assert resumed(folder)[0] == name(99)  # and not 299, of the past that was left
    folder.adopt(tmp_path / name(99), until=99)
    folder.save_periodic(299, content(299, run=1.0))
    assert resumed(folder) == (name(299), 299, 1.0)


def test_retention_counts_whole_files_only(tmp_path):
    folder = filled(tmp_path, iterations=(99, 199), keep=2)
    cut(tmp_path / name(199))
    folder.save_periodic(299, content(299))
    assert name(99) in weights(tmp_path)
    cut(tmp_path / name(299))
    assert resumed(folder)[0] == name(99)
    folder.adopt(tmp_path / name(99), until=99)
    for iteration in (199, 299, 399):
        folder.save_periodic(iteration, content(iteration))
    assert weights(tmp_path) == {name(299), name(399)}


def test_a_tag_put_by_hand_counts_also_after_an_earlier_run(tmp_path):
    filled(tmp_path, iterations=(49,))
    folder = filled(tmp_path, run=1.0)
    for iteration in (99, 49):
        (tmp_path / "last_checkpoint").write_text(name(iteration))
        assert resumed(folder)[0] == name(iteration)


def test_the_tagged_file_is_never_removed(tmp_path):
    folder = filled(tmp_path, iterations=(99,), keep=1)
    folder.save_periodic(199, content(199))
    (tmp_path / "last_checkpoint").write_text(name(199))
    assert weights(tmp_path) == {name(199)}
    folder.save_periodic(49, content(49))
    assert folder.last().name == name(49)


def test_a_file_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, caplog):
    folder = filled(tmp_path, iterations=(99,), keep=1)

    def refuse(path, *args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    folder.save_periodic(199, content(199))
    assert "stays: Operation not permitted" in caplog.text
    monkeypatch.undo()
    folder.save_periodic(299, content(299))
    assert weights(tmp_path) == {name(299)}


# ---- earlier runs in the same folder


def test_starting_anew_keeps_files_but_forgets_them(tmp_path, caplog):
    filled(tmp_path)
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.start_anew()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert name(299) in warning
    assert "--resume" in warning
    assert not folder.has_own()
    # before the first save there is nothing but the earlier run to go on from
    assert resumed(folder) == (name(299), 299, 0.0)
    folder.save_periodic(49, content(49, run=1.0))
    folder.save_periodic(149, content(149, run=1.0))
    assert folder.has_own()
    assert weights(tmp_path) == {name(149), name(99), name(199), name(299)}
    cut(tmp_path / name(149))
    with pytest.raises(UserError, match=rf"no checkpoint .* is whole.*{name(149)}.*start anew"):
        folder.resume()


def test_a_resumed_earlier_run_is_the_present_one_again(tmp_path):
    filled(tmp_path)
    CheckpointFolder(tmp_path).start_anew()
    folder = CheckpointFolder(tmp_path, keep=2)
    path, state = folder.resume()
    folder.adopt(path, until=state["iteration"])
    assert folder.has_own()
    folder.save_periodic(399, content(399))
    assert weights(tmp_path) == {name(299), name(399)}


def test_starting_anew_in_a_clean_folder_says_nothing(tmp_path, caplog):
    CheckpointFolder(tmp_path / "run").start_anew()
    assert not (tmp_path / "run").exists()
    (tmp_path / "notes.txt").write_text("mine")
    CheckpointFolder(tmp_path).start_anew()
    assert not caplog.records
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_files_removed_by_hand_are_no_earlier_run(tmp_path, caplog):
    filled(tmp_path)
    for file in [*tmp_path.glob("*.pth"), tmp_path / "last_checkpoint"]:
        file.unlink()
    folder = CheckpointFolder(tmp_path)
    assert folder.resume() is None
    folder.start_anew()
    assert not caplog.records
    assert not folder.has_own()


def test_foreign_files_are_untouched(tmp_path):
    names = ["model_best.pth", "other.pth", "model_0000005.pth", "model_1.pth", ".x.pth.swp"]
    for each in names:
        (tmp_path / each).write_bytes(b"mine")
    folder = filled(tmp_path, keep=1)
    assert resumed(folder)[0] == name(299)
    for each in names:
        assert (tmp_path / each).read_bytes() == b"mine"


# ---- damage


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_truncation_of_the_newest_file_falls_back(tmp_path, zipped, caplog):
    folder = filled(tmp_path)
    newest = tmp_path / name(299)
    torch.save(content(299), newest, _use_new_zipfile_serialization=zipped)
    data = newest.read_bytes()
    for length in range(len(data)):
        newest.write_bytes(data[:length])
        caplog.clear()
        assert resumed(folder)[:2] == (name(199), 199)
        (warning,) = [record.getMessage() for record in caplog.records]
        assert name(299) in warning
        assert f"going back to {name(199)}" in warning
    assert folder.last().name == name(199)


def test_each_damaged_file_is_reported_once(tmp_path, caplog):
    folder = filled(tmp_path)
    folder.save("model_best", content(250), tag=False)
    folder.save("model_final", content(300))
    (tmp_path / "model_final.pth").unlink()
    data = bytearray((tmp_path / name(299)).read_bytes())
    place = data.index(torch.tensor([299.0]).numpy().tobytes())
    data[place] ^= 1  # one bit of one weight
    (tmp_path / name(299)).write_bytes(data)
    assert resumed(folder)[0] == name(199)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "model_final.pth does not exist" in texts[0]
    assert f"{name(299)} is damaged" in texts[1]
    caplog.clear()
    assert folder.last().name == name(199)
    assert len(caplog.records) == 2
    folder.adopt(tmp_path / name(199), until=199)
    caplog.clear()
    assert resumed(folder)[0] == name(199)
    assert not caplog.records


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    folder = filled(tmp_path, iterations=(99, 199))
    (tmp_path / name(99)).unlink()
    cut(tmp_path / name(199), 0)
    for call in (folder.resume, folder.last):
        with pytest.raises(UserError, match=rf"{name(199)} is damaged.*{name(99)} does not exist"):
            call()


def test_a_refused_file_is_not_passed_over(tmp_path):
    folder = filled(tmp_path)
    torch.save({**content(299), "extra": pytest.approx}, tmp_path / name(299))
    with pytest.raises(UserError, match="allow_pickle"):
        folder.resume()


@pytest.mark.parametrize("tag", [None, b"", b"\xff\xfe\x00", b"model_0000777.pth"])
def test_a_lost_or_wrong_tag_goes_by_the_list(tmp_path, tag):
    folder = filled(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resumed(folder)[0] == name(299)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "[" * 100_000,
        '{"files": 1, "earlier": []}',
        '{"files": [1], "earlier": []}',
        '{"files": [{"name": "../../x.pth", "iteration": 1, "size": 1}], "earlier": []}',
        '{"files": [{"name": 3, "iteration": 1, "size": 1}], "earlier": []}',
        '{"files": [{"name": "a.pth", "iteration": 1, "size": "x"}], "earlier": []}',
    ],
)
def test_a_damaged_list_goes_by_the_names(tmp_path, text, caplog):
    filled(tmp_path)
    (tmp_path / "checkpoints.json").write_text(text)
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.has_own()
    assert resumed(folder)[0] == name(299)
    assert "checkpoints.json is damaged" in caplog.text
    folder.save_periodic(399, content(399))
    assert weights(tmp_path) == {name(299), name(399)}
    caplog.clear()
    assert resumed(folder)[0] == name(399)
    assert not caplog.records


# ---- folders without a list, written by Detectron2


def detectron2_folder(path, iterations, tag):
    for iteration in iterations:
        torch.save(content(iteration), path / name(iteration))
    (path / "last_checkpoint").write_text(tag)


def test_a_folder_without_a_list_falls_back_by_iteration(tmp_path):
    detectron2_folder(tmp_path, (99, 199, 299, 399), name(299))
    folder = CheckpointFolder(tmp_path, keep=2)
    assert not folder.has_own()
    assert resumed(folder)[0] == name(299)
    cut(tmp_path / name(299))
    assert resumed(folder)[0] == name(199)  # 399 is newer than the tag: of another run
    folder.adopt(tmp_path / name(199), until=199)
    assert folder.has_own()
    folder.save_periodic(299, content(299))
    assert weights(tmp_path) == {name(199), name(299), name(399)}


def test_a_final_model_without_a_list_falls_back_to_the_newest(tmp_path):
    detectron2_folder(tmp_path, (99, 199), "model_final.pth")
    folder = CheckpointFolder(tmp_path)
    assert resumed(folder)[0] == name(199)
    torch.save(content(200), tmp_path / "model_final.pth")
    assert resumed(folder)[0] == "model_final.pth"
    folder.start_anew()
    folder.save_periodic(99, content(99, run=1.0))
    cut(tmp_path / name(99))
    with pytest.raises(UserError, match="is whole"):
        folder.resume()


# ---- folders that cannot be written


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder = CheckpointFolder(tmp_path / "file" / "run")
    assert folder.resume() is None
    folder.start_anew()
    with pytest.raises(UserError, match=r"cannot be made.*OUTPUT_DIR"):
        folder.save("model_final", content(1))


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_folder_without_permission_is_one_line(tmp_path):
    folder = filled(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            folder.save_periodic(399, content(399))
        assert resumed(folder)[0] == name(299)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    "tag", ["../outside.pth", "/outside.pth", "folder", "\0", "x" * 999 + ".pth"]
)
def test_a_tag_never_leads_out_of_the_folder(tmp_path, tag, caplog):
    filled(tmp_path / "run")
    filled(tmp_path / "other", [5])
    (tmp_path / "other" / name(5)).rename(tmp_path / "outside.pth")
    (tmp_path / "run" / "last_checkpoint").write_text(tag)
    assert resumed(CheckpointFolder(tmp_path / "run"))[0] == name(299)
    assert "no checkpoint here" in caplog.text
