"""Signals, killed processes and restarts, from outside as a cluster does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from d2dense import checkpoint
from d2dense.engine.signals import EXIT_PREEMPTED
from d2dense.engine.train_net import main
from d2dense.engine.trainer import Trainer
from tests.commands import Command
from tests.tools.interrupted import assert_same

DEADLINE = 120


class Run:
    """A training command in the background.

    Args:
        launcher: command line before the script.
        log: file for its output.
    """

    def __init__(self, root, config, *arguments, launcher=(), log):
        environ = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        words = [*launcher, root / "tools" / "train_net.py", "--config-file", config, *arguments]
        self.log = Path(log)
        self.process = Command(words, log=self.log, environ=environ, cwd=root)

    def wait_for(self, condition, what):
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended before {what}:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() - start > DEADLINE:
                self.process.kill()
                raise AssertionError(f"no {what}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def exit_code(self):
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"hangs:\n{self.log.read_text()[-3000:]}") from None


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def saved_iteration(folder):
    tag = folder / "last_checkpoint"
    text = tag.read_text() if tag.exists() else ""
    return int(text[6:13]) if text[6:13].isdigit() else -1


def overrides(folder, steps, period):
    return [
        f"train.output_dir={folder}",
        f"train.max_iter={steps}",
        f"train.checkpointer.period={period}",
        "train.checkpointer.max_to_keep=2",
        "train.eval_period=0",
        "train.best.metric=",
        "train.early_stop_patience=0",
        "train.log_period=5",
    ]


def iterations_logged(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def test_sigterm_saves_the_step_and_exits_with_its_code(repo_root, configs, tmp_path):
    """One process; the resumed run ends as one that nobody stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["--config-file", configs["lazy"], *overrides(whole, 60, 1000)]) == 0
    arguments = [*overrides(parts, 60, 1000), "--resume"]
    run = Run(repo_root, configs["lazy"], *arguments, log=tmp_path / "log")
    run.wait_for(lambda: (parts / "metrics.json").exists(), "report")
    os.kill(run.process.pid, signal.SIGTERM)
    os.kill(run.process.pid, signal.SIGTERM)  # a second one must not break the saving
    assert run.exit_code() == EXIT_PREEMPTED == 75
    done = saved_iteration(parts) + 1
    assert 0 < done < 60
    log = run.log.read_text()
    assert f"stopped after {done} iterations: SIGTERM; --resume goes on" in log
    assert "Traceback" not in log
    assert main(["--config-file", configs["lazy"], *arguments]) == 0
    one, two = (checkpoint.read(folder / "model_final.pth") for folder in (parts, whole))
    assert_same(one, two)
    assert iterations_logged(parts) == iterations_logged(whole)


def test_sigusr1_to_the_launcher_stops_both_processes(repo_root, configs, tmp_path):
    folder = tmp_path / "run"
    arguments = [*overrides(folder, 2000, 1000), "--num-gpus", "2", "--device", "cpu"]
    run = Run(repo_root, configs["lazy"], *arguments, log=tmp_path / "log")
    run.wait_for(lambda: (folder / "metrics.json").exists(), "report")
    started = children(run.process.pid)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.exit_code() == EXIT_PREEMPTED
    assert saved_iteration(folder) > 0
    assert len(started) >= 2
    end = time.monotonic() + 10  # multiprocessing's own helper ends a little later
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.05)
    assert "Traceback" not in run.log.read_text()


def test_a_signal_to_the_whole_group_with_loader_workers(repo_root, configs, tmp_path):
    """As SLURM and container runtimes do it: loader workers get the signal too."""
    folder = tmp_path / "run"
    arguments = [*overrides(folder, 2000, 1000), "dataloader.train.num_workers=2"]
    run = Run(repo_root, configs["lazy"], *arguments, log=tmp_path / "log")
    run.wait_for(lambda: (folder / "metrics.json").exists(), "report")
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.exit_code() == EXIT_PREEMPTED
    assert saved_iteration(folder) > 0
    assert "Traceback" not in run.log.read_text()


def test_a_signal_while_the_model_is_built(configs, tmp_path, monkeypatch):
    """The first step is done, saved, and the run ends as it does for later signals."""
    build = Trainer._build_model

    def signalled(self, *, load):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(self, load=load)

    monkeypatch.setattr(Trainer, "_build_model", signalled)
    arguments = ["--config-file", configs["lazy"], *overrides(tmp_path / "run", 60, 1000)]
    assert main(arguments) == EXIT_PREEMPTED
    assert saved_iteration(tmp_path / "run") == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_torchrun_restarts_after_a_kill_and_loses_little(repo_root, configs, tmp_path):
    """One of two workers is killed with -9; the run goes on by itself to the same weights."""
    steps, period = 60, 5
    launcher = [
        *("-m", "tests.torchrun", "--standalone"),
        *("--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*overrides(whole, steps, period), "--device", "cpu", "--num-gpus", "2"]
    assert main(["--config-file", configs["lazy"], *arguments]) == 0
    arguments = [*overrides(killed, steps, period), "--device", "cpu"]
    run = Run(repo_root, configs["lazy"], *arguments, launcher=launcher, log=tmp_path / "log")
    run.wait_for(lambda: saved_iteration(killed) >= 9, "second checkpoint")
    os.kill(children(run.process.pid)[-1], signal.SIGKILL)
    assert run.exit_code() == 0, run.log.read_text()[-3000:]
    log = (killed / "log.txt").read_text()
    resumed = [line for line in log.splitlines() if "resumed from" in line]
    assert len(resumed) == 1
    start = int(resumed[0].rsplit(" ", 1)[1])
    reported = [int(part.split("/")[0]) for part in log.split("iter ")[1:]]
    before = max(
        i for i in reported[: reported.index(next(i for i in reported if i > start))] or [0]
    )
    assert start >= 10
    assert before - start <= period + 5  # a report is up to five steps late
    one, two = (checkpoint.read(folder / "model_final.pth") for folder in (killed, whole))
    assert_same(one, two)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_restart_without_a_checkpoint_starts_anew(repo_root, configs, tmp_path, processes):
    """An earlier run's checkpoint in the folder is not mistaken for this one's."""
    folder = tmp_path / "run"
    arguments = [*overrides(folder, 4, 1000), "--device", "cpu"]
    assert main(["--config-file", configs["lazy"], *arguments]) == 0
    earlier = (folder / "model_final.pth").stat().st_mtime_ns
    launcher = [
        *("-m", "tests.torchrun", "--standalone"),
        *("--nproc-per-node", str(processes), "--max-restarts", "1", "--monitor-interval", "0.1"),
    ]
    arguments = [*overrides(folder, 150, 1000), "--device", "cpu"]
    reports = len(iterations_logged(folder))
    run = Run(repo_root, configs["lazy"], *arguments, launcher=launcher, log=tmp_path / "log")
    run.wait_for(lambda: len(iterations_logged(folder)) > reports, "report")
    os.kill(children(run.process.pid)[0], signal.SIGKILL)
    assert run.exit_code() == 0
    assert "resumed from" not in (folder / "log.txt").read_text()
    assert (folder / "model_final.pth").stat().st_mtime_ns > earlier
    assert checkpoint.read(folder / "model_final.pth")["iteration"] == 149
