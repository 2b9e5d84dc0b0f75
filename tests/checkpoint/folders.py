"""Folders of checkpoints as runs leave them."""

from __future__ import annotations

import torch

from d2dense.checkpoint import CheckpointFolder


def content(iteration, run=0.0):
    return {"model": {"w": torch.tensor([float(iteration), run])}, "iteration": iteration}


def name(iteration):
    return f"model_{iteration:07d}.pth"


def filled(path, iterations=(99, 199, 299), *, keep=0, run=0.0) -> CheckpointFolder:
    folder = CheckpointFolder(path, keep=keep)
    folder.start_anew()
    for iteration in iterations:
        folder.save_periodic(iteration, content(iteration, run))
    return folder


def weights(path) -> set[str]:
    return {file.name for file in path.glob("*.pth")}


def resumed(folder) -> tuple[str, int, float]:
    """Return the file that is resumed, its iteration and its run."""
    path, state = folder.resume()
    iteration, run = state["model"]["w"].tolist()
    assert state["iteration"] == iteration
    return path.name, int(iteration), run


def cut(path, size=40):
    path.write_bytes(path.read_bytes()[:size])
