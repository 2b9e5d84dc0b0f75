"""Two processes, of which one has no objects, or neither: every detector of the family gives every
parameter a gradient, so that nobody waits, and the processes agree; with the trainer's own wrapper,
which does not look for unused parameters.
"""

from __future__ import annotations

import torch

from d2dense.engine.launch import launch
from tests.engine.workers import arguments
from tests.projects.codetr import family, family_workers


def test_processes_without_objects(tmp_path):
    launch(family_workers.run, arguments(output_dir=str(tmp_path)))
    first, second = (
        torch.load(tmp_path / f"found{rank}.pth", weights_only=True) for rank in range(2)
    )
    assert len(first) == len(family.SETS) + 2 * len(family.BASES)
    for name, step in first.items():
        assert step["finite"], name
        assert second[name]["finite"], name
        assert step["sum"] > 0
        assert step["sum"] == second[name]["sum"], name
