"""Checkpoints of a run that was killed at any step of a save."""

from __future__ import annotations

import json
import os

import pytest

from d2dense.checkpoint import CheckpointFolder
from tests.checkpoint.folders import content, cut, filled, name, resumed, weights

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


class Killed(BaseException):
    """The end of the process: nothing reaches the disk any more."""


def killed_after(monkeypatch, steps: int) -> None:
    """Let the process die at the file system call number ``steps``."""
    done = []

    def deadly(call):
        def wrapped(*args, **kwargs):
            done.append(call)
            if len(done) > steps:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    for each in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, each, deadly(getattr(os, each)))


def life(path, done: list) -> None:
    """Save what a run saves; ``done`` receives the iterations that are certain to be there."""
    folder = CheckpointFolder(path, keep=2)
    folder.start_anew()
    done.append(-1)
    for iteration in (4, 9, 14, 19):
        folder.save_periodic(iteration, content(iteration, run=1.0))
        done.append(iteration)
        folder.save("model_best", content(iteration, run=1.0), tag=False)
    folder.save("model_final", content(20, run=1.0))
    done.append(20)


@pytest.mark.parametrize("earlier", [(), (4, 9)], ids=["clean", "earlier run"])
def test_killed_at_any_step_the_run_goes_on(tmp_path, monkeypatch, earlier):
    for steps in range(200):
        path = tmp_path / str(steps)
        filled(path, iterations=earlier)
        done: list[int] = []
        with monkeypatch.context() as patch:
            killed_after(patch, steps)
            try:
                life(path, done)
            except Killed:
                pass
            else:
                break
        assert_goes_on(path, done, earlier)
    assert 50 < steps < 199  # each step of each save was tried
    assert done == [-1, 4, 9, 14, 19, 20]


def assert_goes_on(path, done, earlier):
    folder = CheckpointFolder(path, keep=2)
    iteration = -1
    if not done:  # killed while it told that it starts anew: the earlier run is what there is
        assert resumed(folder) == (name(9), 9, 0.0)
        folder.start_anew()
    elif not folder.has_own():
        assert done == [-1]
        assert (folder.resume() is None) == (not earlier)
        folder.start_anew()
    else:
        _, iteration, run = resumed(folder)
        assert run == 1.0
        last = done[-1]
        assert iteration in {last, min(last + 5, 20) if last >= 0 else 4}
        folder.adopt(folder.last(), until=iteration)
    for iteration in [each for each in (4, 9, 14, 19, 24, 29) if each > iteration]:
        folder.save_periodic(iteration, content(iteration, run=2.0))
    assert resumed(folder) == (name(29), 29, 2.0)
    left = weights(path) - {name(each) for each in earlier}
    assert left - {"model_best.pth", "model_final.pth"} == {name(24), name(29)}
    assert not list(path.glob(".*"))


def test_killed_while_going_back_the_run_goes_on(tmp_path, monkeypatch):
    for steps in range(20):
        path = tmp_path / str(steps)
        filled(path, iterations=(99, 199))
        cut(path / name(199))
        with monkeypatch.context() as patch:
            killed_after(patch, steps)
            try:
                folder = CheckpointFolder(path)
                folder.adopt(folder.last(), until=99)
            except Killed:
                pass
            else:
                break
        assert resumed(CheckpointFolder(path))[0] == name(99)
    assert 4 < steps < 19


def test_killed_twice_before_the_tag_moved_from_an_earlier_run(tmp_path, monkeypatch):
    for steps in range(20):
        path = tmp_path / str(steps)
        filled(path, iterations=(99,))
        folder = filled(path, iterations=(49,), run=1.0)
        # as the first kill leaves it: the list has the new file, the tag has the old one
        listed = json.loads((path / "checkpoints.json").read_text())
        listed["earlier"] = [{**listed["files"][0], "name": name(99), "iteration": 99}]
        (path / "checkpoints.json").write_text(json.dumps(listed))
        (path / "last_checkpoint").write_text(name(99))
        with monkeypatch.context() as patch:
            killed_after(patch, steps)
            try:
                folder.adopt(folder.last(), until=49)
            except Killed:
                pass
            else:
                break
        assert resumed(CheckpointFolder(path)) == (name(49), 49, 1.0)
    assert 4 < steps < 19
