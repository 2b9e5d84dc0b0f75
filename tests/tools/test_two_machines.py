"""Two machines, each a command of its own that meets the other on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.train_net import main
from tests.commands import Command

DEADLINE = 120
STEPS = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(root, log, config, output, *flags, launcher=(), steps=STEPS):
    """Start one machine's command in the background; its lines go to ``log``."""
    environ = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    words = [*launcher, root / "tools" / "train_net.py", "--config-file", config]
    words += ["--device", "cpu", *flags, f"train.output_dir={output}", f"train.max_iter={steps}"]
    return Command(words, log=log, environ=environ, cwd=root)


def exit_codes(processes):
    """Wait for all; none outlives the test."""
    end = time.monotonic() + DEADLINE
    try:
        return [each.wait(max(1, end - time.monotonic())) for each in processes]
    finally:
        for each in processes:
            if each.poll() is None:
                each.kill()


def machines(root, folder, config, output, *, each=1, **options):
    """Start both machines, with ``each`` processes."""
    meeting = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    meeting += ["--num-gpus", each]
    return [
        start(
            root, folder / f"machine{k}", config, output, *meeting, "--machine-rank", k, **options
        )
        for k in (0, 1)
    ]


def agents(root, folder, config, output):
    """Start a torchrun agent on both machines, with one process each."""
    port = free_port()
    return [
        start(
            root,
            folder / f"machine{k}",
            config,
            output,
            launcher=[
                *("-m", "tests.torchrun", "--nnodes", 2, "--node-rank", k),
                *("--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port),
            ],
        )
        for k in (0, 1)
    ]


def names(folder):
    """The files of a run; TensorBoard's hold the time in their name."""
    return sorted(path.name.split(".tfevents")[0] for path in folder.rglob("*") if path.is_file())


def assert_same_run(one, two):
    assert names(one) == names(two)
    first, second = (checkpoint.read(folder / "model_final.pth") for folder in (one, two))
    for key in ("model", "train_model"):
        for name, value in first[key].items():
            assert torch.equal(second[key][name], value), name
    lines = [(folder / "metrics.json").read_text().splitlines() for folder in (one, two)]
    assert len(lines[0]) == len(lines[1])
    values = [json.loads(each[-1]) for each in lines]
    for name in ("total_loss", "lr", "bbox/AP", "iteration"):
        assert values[0][name] == values[1][name]
    for name in ("log.txt", "log.txt.rank1"):
        assert (two / name).read_text().count("command line:") == 1


@pytest.fixture
def one_machine(tmp_path, configs):
    """The output of one machine with two processes."""
    overrides = [f"train.output_dir={tmp_path / 'one'}", f"train.max_iter={STEPS}"]
    command = ["--config-file", configs["lazy"], "--device", "cpu", "--num-gpus", "2", *overrides]
    assert main(command) == 0
    return tmp_path / "one"


def test_two_machines_train_like_one(repo_root, tmp_path, configs, one_machine):
    """They share the output folder, in which everything is there once."""
    runs = machines(repo_root, tmp_path, configs["lazy"], tmp_path / "two")
    logs = [tmp_path / "machine0", tmp_path / "machine1"]
    assert exit_codes(runs) == [0, 0], "".join(log.read_text() for log in logs)
    assert_same_run(one_machine, tmp_path / "two")
    assert "2 process(es)" in logs[0].read_text()
    assert "iter " not in logs[1].read_text()  # the first machine's console says it all


def test_two_agents_of_torchrun_train_like_one_machine(repo_root, tmp_path, configs, one_machine):
    runs = agents(repo_root, tmp_path, configs["lazy"], tmp_path / "two")
    assert exit_codes(runs) == [0, 0], (tmp_path / "machine0").read_text()
    assert_same_run(one_machine, tmp_path / "two")


@pytest.mark.long
def test_two_processes_on_each_of_two_machines(repo_root, tmp_path, configs):
    config = configs["lazy"]
    # four processes need eight images for two accumulated batches
    batch = "dataloader.train.total_batch_size=8"
    alone = start(repo_root, tmp_path / "log", config, tmp_path / "one", "--num-gpus", 4, batch)
    assert exit_codes([alone]) == [0], (tmp_path / "log").read_text()
    Path(tmp_path / "more.py").write_text(
        Path(config).read_text().replace("batch_size=4", "batch_size=8")
    )
    runs = machines(repo_root, tmp_path, tmp_path / "more.py", tmp_path / "two", each=2)
    assert exit_codes(runs) == [0, 0], (tmp_path / "machine0").read_text()
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for rank in (1, 2, 3):
        assert (tmp_path / "two" / f"log.txt.rank{rank}").is_file()


def test_a_machine_that_dies_ends_the_other(repo_root, tmp_path, configs):
    output = tmp_path / "out"
    runs = machines(repo_root, tmp_path, configs["lazy"], output, steps=100_000)
    end = time.monotonic() + DEADLINE
    while not (output / "last_checkpoint").is_file():
        assert time.monotonic() < end, (tmp_path / "machine0").read_text()
        time.sleep(0.1)
    os.killpg(runs[1].pid, signal.SIGKILL)
    start_waiting = time.monotonic()
    first, second = exit_codes(runs)
    assert second == -signal.SIGKILL
    assert first == 1
    assert time.monotonic() - start_waiting < 60
