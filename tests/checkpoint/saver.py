"""A run that does nothing but save: ``python saver.py FOLDER``; for the tests of kills."""

from __future__ import annotations

import sys

import torch

from d2dense.checkpoint import CheckpointFolder

SIZE = 1_000_000  # 4 MB: most of the time goes into saving


def content(iteration: int) -> dict:
    return {"model": {"w": torch.full((SIZE,), float(iteration))}, "iteration": iteration}


def main(path: str) -> None:
    folder = CheckpointFolder(path, keep=2)
    found = folder.resume()
    iteration = 0
    if found is None:
        folder.start_anew()
    else:
        file, state = found
        iteration = state["iteration"] + 1
        folder.adopt(file, until=state["iteration"])
    while True:
        print("saved", folder.save_periodic(iteration, content(iteration)), flush=True)
        iteration += 1


if __name__ == "__main__":
    main(sys.argv[1])
