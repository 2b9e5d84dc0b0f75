"""A shortage of memory at the command line, and that the keys it names exist."""

from __future__ import annotations

import shlex

import pytest
import torch

from d2dense import config
from d2dense.engine.experiment import experiment
from d2dense.engine.memory import evaluation_levers, training_levers
from d2dense.engine.settings import RunSettings
from d2dense.engine.train_net import main
from d2dense.errors import run_tool
from tests.tools.tiny_detector import TinyDetector


@pytest.fixture
def levers(monkeypatch):
    monkeypatch.setattr("d2dense.engine.memory.comm.get_world_size", lambda: 2)
    found = (
        training_levers(RunSettings(output_dir="unused", max_iter=1, accumulation_steps=2))
        + evaluation_levers()
    )
    monkeypatch.undo()
    assert len(found) == 8
    return found


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_every_named_key_exists_in_both_kinds(configs, levers, kind):
    """A wrong key or value would be an error of loading, or of the experiment."""

    def dump(*words):
        off = {"yaml": "SOLVER.AMP.ENABLED=False", "lazy": "train.amp.enabled=false"}[kind]
        return config.dump(experiment(config.load(configs[kind], [off, *words])).cfg)

    for lever in levers:
        words = shlex.split(lever.yacs if kind == "yaml" else lever.lazy)
        if len(words) == 1 and "=" not in words[0]:  # the user chooses the value
            words = [f"{words[0]}=32"]
        assert dump(*words) != dump(), lever


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_the_command_ends_with_one_line_and_code_2(configs, kind, monkeypatch, capsys):
    monkeypatch.setattr(TinyDetector, "forward", lambda self, batch: torch.empty(2**58))
    assert run_tool(lambda: main(["--config-file", configs[kind]])) == 2
    error = capsys.readouterr().err
    (line,) = [each for each in error.splitlines() if "out of memory" in each]
    assert "in iteration 0 (asked for another" in line
    assert "TRAIN.ACTIVATION_CHECKPOINTING True / train.activation_checkpointing=true" in line
    assert "SOLVER.AMP" not in line  # it is on
    assert "Traceback" not in error
