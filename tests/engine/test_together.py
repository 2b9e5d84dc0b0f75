"""What processes that decide or start differently have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from d2dense.engine.launch import launch
from d2dense.engine.together import decided_by_main
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine.fakes import FakeExperiment, TinyModel
from tests.engine.workers import arguments


class RandomBuffer(TinyModel):
    """As models with random features, which are drawn once and never trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("drawn", torch.randn(5))


def fail():
    raise UserError("found one thing")


def note(args):
    rank = comm.get_rank()
    value = decided_by_main(lambda: f"from {rank}")
    with pytest.raises(UserError, match="found one thing"):
        decided_by_main(fail)
    experiment = FakeExperiment(Path(args.output_dir, "run"))
    experiment.build_model = RandomBuffer
    buffer = Trainer(experiment).model.drawn.tolist()
    Path(args.output_dir, f"note{rank}.json").write_text(json.dumps([value, buffer]))


def test_two_processes(tmp_path):
    launch(note, arguments(output_dir=str(tmp_path)))
    first, second = (json.loads((tmp_path / f"note{rank}.json").read_text()) for rank in range(2))
    assert first[0] == "from 0"
    assert first == second


def test_one_process():
    assert decided_by_main(lambda: None) is None
    with pytest.raises(UserError, match="found one thing"):
        decided_by_main(fail)
