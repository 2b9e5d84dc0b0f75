"""A run that was stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from torch.multiprocessing import ProcessRaisedException

from d2dense import checkpoint
from d2dense.data import shapes
from d2dense.engine.launch import launch
from d2dense.engine.signals import Preempted
from tests.tools import interrupted
from tests.tools.conftest import write_configs

STEPS = 6
TIMED = ("time", "data_time", "eta_seconds", "images_per_second", "max_mem_mb")
# On top of the tiny configs, which have averages, bfloat16, clipping and two batches per step:
# workers, images of random sizes, a report that straddles checkpoints.
OVERRIDES = {
    "yaml": [
        *("MODEL.META_ARCHITECTURE", "NoisyDetector"),
        *("DATALOADER.NUM_WORKERS", "2"),
        *("SOLVER.MAX_ITER", str(STEPS)),
        *("SOLVER.CHECKPOINT_PERIOD", "2"),
        *("TEST.EVAL_PERIOD", "2"),
        *("TRAIN.LOG_PERIOD", "4"),
        *("INPUT.MIN_SIZE_TRAIN", "(24,32,40)"),
    ],
    "lazy": [
        "dataloader.train.num_workers=2",
        f"train.max_iter={STEPS}",
        "train.checkpointer.period=2",
        "train.eval_period=2",
        "train.log_period=4",
        "dataloader.train.mapper.augmentations.min_size=[24,32,40]",
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, coco_set):
    configs = write_configs(tmp_path_factory.mktemp("configs"), coco_set)
    interrupted.use_noisy_detector(configs["lazy"])
    return configs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files):
    """Folders of runs that nothing stopped, by kind of config."""
    runs = {}

    def build(kind):
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("whole") / "run"
            train(files, kind, runs[kind])
        return runs[kind]

    return build


def arguments(files, kind, folder, *, more=(), **options):
    key = "OUTPUT_DIR" if kind == "yaml" else "train.output_dir"
    overrides = [*OVERRIDES[kind], key, str(folder), *more]
    return interrupted.arguments(files[kind], overrides, stream=f"{folder}.stream", **options)


def train(files, kind, folder, **options):
    launch(interrupted.run, arguments(files, kind, folder, **options))


def streams(folder):
    """What each process saw, in order."""
    found = sorted(folder.parent.glob(f"{folder.name}.stream*"))
    return [file.read_text().splitlines() for file in found]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in lines]


def assert_same_run(found, expected, *, kept):
    """``kept``: steps of the first part that a checkpoint holds; the rest was done again."""
    for name in ("model_0000005.pth", "model_best.pth", "model_final.pth"):
        one, two = (checkpoint.read(folder / name) for folder in (found, expected))
        interrupted.assert_same(one, two, name)
    assert rows(found) == rows(expected)
    assert len(streams(found)) == len(streams(expected))
    for one, two in zip(streams(found), streams(expected)):
        tail = len(two) * (STEPS - kept) // STEPS
        assert one[-tail:] == two[-tail:]
        assert one[: len(one) - tail][: len(two) - tail] == two[: len(two) - tail]
    assert (found / "last_checkpoint").read_text() == "model_final.pth"


# moment, steps completed by then, steps that are not lost
STOPS = {
    "in a step": ("step", 3, 2),
    "in an accumulation": ("accumulation", 3, 2),
    "after an evaluation": ("evaluation", 4, 4),
    "by a signal": ("signal", 3, 3),
    "by a signal before an evaluation": ("signal", 4, 4),
}


def check(files, expected, folder, kind, stop, crash=interrupted.Crash, **options):
    moment, completed, kept = STOPS[stop]
    with pytest.raises(Preempted if moment == "signal" else crash):
        train(files, kind, folder, stop=(moment, completed), **options)
    assert not (folder / "model_final.pth").exists()
    assert checkpoint.CheckpointFolder(folder).resume()[1]["iteration"] == kept - 1
    train(files, kind, folder, processes=options.get("processes", 1), resume=True)
    assert_same_run(folder, expected, kept=kept)


@pytest.mark.parametrize("stop", STOPS)
def test_one_process(files, whole, tmp_path, stop):
    check(files, whole("yaml"), tmp_path / "run", "yaml", stop)


def test_one_process_with_a_lazy_config(files, whole, tmp_path):
    check(files, whole("lazy"), tmp_path / "run", "lazy", "in an accumulation")


@pytest.mark.parametrize(
    "stop", ["by a signal", pytest.param("in an accumulation", marks=pytest.mark.long)]
)
def test_two_processes(files, tmp_path, stop):
    """The signal goes to one of them only. The run that nothing stops is done by the processes
    that then start the other one: they take longer to begin than to train.
    """
    expected = arguments(files, "yaml", tmp_path / "whole", processes=2)
    options = {"processes": 2, "before": expected, "crash": ProcessRaisedException}
    check(files, tmp_path / "whole", tmp_path / "run", "yaml", stop, **options)


def test_a_real_detector(tmp_path):
    """FSCascade samples proposals at random in its forward pass; the stop is in its third step."""
    shapes.generate(output_dir=tmp_path, split="train", count=8, size=96, seed=1)
    slots = {
        f"datasets.{slot}.{key}": path
        for slot in ("train", "val")
        for key, path in (
            ("json", tmp_path / "annotations" / "instances_train.json"),
            ("images", tmp_path / "images" / "train"),
        )
    }
    settings = {
        **slots,
        "train.max_iter": STEPS,
        "train.checkpointer.period": 1,
        "dataloader.train.total_batch_size": 2,
        "train.seed": 4,
    }
    contents = []
    for name, stop in (("whole", None), ("parts", ("step", 2)), ("parts", None)):
        args = interrupted.arguments(
            "FSCascade/fscascade_tiny_shapes",
            [f"{k}={v}" for k, v in (settings | {"train.output_dir": tmp_path / name}).items()],
            stream=tmp_path / f"{name}.stream",
            resume=name == "parts",
            stop=stop,
        )
        with pytest.raises(interrupted.Crash) if stop else nullcontext():
            launch(interrupted.run, args)
        if not stop:
            contents.append(checkpoint.read(tmp_path / name / "model_final.pth"))
    interrupted.assert_same(contents[1], contents[0])


def test_what_is_compared_is_not_trivial(whole):
    """Images are augmented anew each time, and every kind of state is in the checkpoint."""
    folder = whole("yaml")
    (stream,) = streams(folder)
    assert len(stream) == 4 * STEPS
    assert len(set(stream)) > 4 * STEPS // 2
    content = checkpoint.read(folder / "model_final.pth")
    assert {"ema", "train_model", "optimizer", "scheduler", "random", "progress"} <= set(content)
    assert content["ema"]["updates"] == STEPS
    assert [row["iteration"] for row in rows(folder)] == [3, 5]
    assert {"loss_box", "total_loss", "lr", "bbox/AP"} <= set(rows(folder)[0])


def test_a_drawn_seed_is_kept(files, tmp_path):
    """SEED -1 draws one; the resumed run goes on with it."""
    folder = tmp_path / "drawn"
    with pytest.raises(interrupted.Crash):
        train(files, "yaml", folder, stop=("step", 3), more=["SEED", "-1"])
    train(files, "yaml", folder, resume=True, more=["SEED", "-1"])
    seed = checkpoint.read(folder / "model_final.pth")["progress"]["seed"]
    train(files, "yaml", tmp_path / "fixed", more=["SEED", str(seed)])
    assert_same_run(folder, tmp_path / "fixed", kept=2)


def test_a_run_of_two_processes_goes_on_with_one_and_back(files, tmp_path):
    """The images stay those of the stream: each is used once, whoever reads it."""
    folder = tmp_path / "run"
    ungrouped = ["DATALOADER.ASPECT_RATIO_GROUPING", "False"]
    for processes, steps in ((2, 2), (1, 4), (2, STEPS)):
        stop = ("signal", steps) if steps < STEPS else None
        with pytest.raises(Preempted) if stop else nullcontext():
            train(
                files,
                "yaml",
                folder,
                processes=processes,
                resume=True,
                stop=stop,
                more=ungrouped,
            )
    train(files, "yaml", tmp_path / "whole", more=ungrouped)
    used = [image for stream in streams(folder) for image in stream]
    assert sorted(used) == sorted(streams(tmp_path / "whole")[0])
    assert checkpoint.read(folder / "model_final.pth")["iteration"] == STEPS - 1
