"""The command line of training and evaluation, both kinds of config, one and two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from d2dense import checkpoint, config, model_zoo
from d2dense.data import shapes
from d2dense.engine.experiment import experiment
from d2dense.engine.train_net import main
from d2dense.errors import UserError, run_tool
from tests.commands import Command

KINDS = ("yaml", "lazy")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def weights(folder, name="model_final.pth"):
    return checkpoint.read(folder / name)["model"]


def test_both_kinds_train_the_same(tmp_path, configs):
    exps = {kind: experiment(config.load(path)) for kind, path in configs.items()}
    settings = {kind: vars(exp.settings) | {"output_dir": ""} for kind, exp in exps.items()}
    assert settings["yaml"] == settings["lazy"]
    groups = {}
    for kind, exp in exps.items():
        optimizer = exp.build_optimizer(exp.build_model())
        groups[kind] = [
            {k: len(v) if k == "params" else v for k, v in group.items()}
            for group in optimizer.param_groups
        ]
    assert len(groups["yaml"]) == 2
    for one, two in zip(groups["yaml"], groups["lazy"]):
        assert {**one, "betas": tuple(one["betas"])} == {**two, "betas": tuple(two["betas"])}

    for path in configs.values():
        assert main(["--config-file", path]) == 0
    out = {kind: tmp_path / f"out_{kind}" for kind in KINDS}
    for kind in KINDS:
        names = {file.name for file in out[kind].iterdir()}
        assert {"config.yaml", "log.txt", "metrics.json", "model_0000001.pth"} <= names
        assert {"model_final.pth", "model_best.pth", "last_checkpoint"} <= names
        assert (out[kind] / "config.yaml").read_text() == config.dump(exps[kind].cfg)
    reloaded = experiment(config.load(out["yaml"] / "config.yaml"))
    assert vars(reloaded.settings) == vars(exps["yaml"].settings)
    for key in ("model", "train_model"):
        found = [checkpoint.read(out[kind] / "model_final.pth")[key] for kind in KINDS]
        for name, value in found[0].items():
            assert torch.equal(found[1][name], value), name
    timed = ("time", "data_time", "eta_seconds", "images_per_second", "max_mem_mb")
    logged = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(out[kind])]
        for kind in KINDS
    ]
    assert logged[0] == logged[1]
    assert {"bbox/AP", "bbox/AP50", "loss_box", "loss_cls", "total_loss"} <= set(logged[0][-1])


FIELDS = {
    "output_dir": ("OUTPUT_DIR", "train.output_dir", "elsewhere"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter", 77),
    "init_checkpoint": ("MODEL.WEIGHTS", "train.init_checkpoint", "a.pth"),
    "seed": ("SEED", "train.seed", 11),
    "log_period": ("TRAIN.LOG_PERIOD", "train.log_period", 9),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period", 12),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", 13),
    "checkpoint_keep": ("SOLVER.CHECKPOINT_KEEP", "train.checkpointer.max_to_keep", 8),
    "amp_enabled": ("SOLVER.AMP.ENABLED", "train.amp.enabled", False),
    "amp_dtype": ("SOLVER.AMP.DTYPE", "train.amp.dtype", "float16"),
    "accumulation_steps": ("SOLVER.ACCUMULATION_STEPS", "train.accumulation_steps", 4),
    "clip_enabled": ("SOLVER.CLIP_GRADIENTS.ENABLED", "train.clip_gradients.enabled", False),
    "clip_type": ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "train.clip_gradients.clip_type", "norm"),
    "clip_value": ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "train.clip_gradients.clip_value", 0.25),
    "clip_norm_type": ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "train.clip_gradients.norm_type", 1.0),
    "ema_enabled": ("SOLVER.EMA.ENABLED", "train.ema.enabled", False),
    "ema_decay": ("SOLVER.EMA.DECAY", "train.ema.decay", 0.5),
    "ema_warmup": ("SOLVER.EMA.WARMUP", "train.ema.warmup", False),
    "ema_time_constant": ("SOLVER.EMA.TIME_CONSTANT", "train.ema.time_constant", 700.0),
    "ema_eval": ("SOLVER.EMA.EVAL", "train.ema.eval", False),
    "channels_last": ("TRAIN.CHANNELS_LAST", "train.channels_last", False),
    "compile": ("TRAIN.COMPILE", "train.compile", True),
    "find_unused_parameters": (
        "TRAIN.FIND_UNUSED_PARAMETERS",
        "train.ddp.find_unused_parameters",
        True,
    ),
    "activation_checkpointing": (
        "TRAIN.ACTIVATION_CHECKPOINTING",
        "train.activation_checkpointing",
        True,
    ),
    "best_metric": ("TEST.BEST_METRIC", "train.best.metric", "bbox/AP75"),
    "best_mode": ("TEST.BEST_MODE", "train.best.mode", "min"),
    "early_stop_patience": ("TEST.EARLY_STOP_PATIENCE", "train.early_stop_patience", 3),
    "allow_pickle": ("TRAIN.ALLOW_PICKLE", "train.allow_pickle", True),
    "reinit_misshaped": ("TRAIN.REINIT_MISSHAPED", "train.reinit_misshaped", True),
    "init_classes": ("TRAIN.INIT_CLASSES", "train.init_classes", "shapes_train"),
    "total_batch_size": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size", 8),
    "lr_rule": ("SOLVER.LR_SCALING.RULE", "train.lr_scaling.rule", "sqrt"),
    "reference_batch_size": (
        "SOLVER.LR_SCALING.REFERENCE_BATCH",
        "train.lr_scaling.reference_batch",
        32,
    ),
    "non_finite_policy": ("TRAIN.NON_FINITE.POLICY", "train.non_finite.policy", "skip"),
    "max_skipped_steps": ("TRAIN.NON_FINITE.MAX_SKIPS", "train.non_finite.max_skips", 7),
    "sharding": ("TRAIN.SHARDING", "train.sharding", "zero1"),
}


def test_every_run_setting_is_reached_from_both_kinds(configs):
    for index, kind in enumerate(KINDS):
        before = vars(experiment(config.load(configs[kind])).settings)
        # the device alone has a flag of its own
        assert set(before) - {"device"} == set(FIELDS)
        overrides = []
        for name, entry in FIELDS.items():
            assert before[name] != entry[2], name
            overrides += [entry[index], str(entry[2])]
        after = vars(experiment(config.load(configs[kind], overrides)).settings)
        expected = {name: entry[2] for name, entry in FIELDS.items()}
        assert {name: after[name] for name in FIELDS} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_overrides_resume_and_eval_only(tmp_path, configs, kind, capsys):
    out = tmp_path / "run"
    spell = {
        "yaml": ["OUTPUT_DIR", str(out), "SOLVER.MAX_ITER"],
        "lazy": ["train.output_dir", str(out), "train.max_iter"],
    }[kind]
    command = ["--config-file", configs[kind]]
    assert main([*command, *spell, "2"]) == 0
    assert checkpoint.read(out / "model_final.pth")["iteration"] == 1
    assert main([*command, *spell, "3", "--resume"]) == 0
    assert checkpoint.read(out / "model_final.pth")["iteration"] == 2
    trained = rows(out)[-1]["bbox/AP"]
    assert trained > 1

    path = str(out / "model_final.pth")
    key = {"yaml": "MODEL.WEIGHTS", "lazy": "train.init_checkpoint"}[kind]
    for extra in ([key, path], ["--resume"]):
        capsys.readouterr()
        assert main([*command, *spell, "3", "--eval-only", *extra]) == 0
        table = capsys.readouterr().out.rpartition("custom_val, bbox:")[2].splitlines()
        assert table[3].split()[1] == f"{trained:.3f}"


def test_two_runs_with_one_seed_are_equal_and_two_seeds_are_not(tmp_path, configs):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = str(tmp_path / name)
        main(["--config-file", configs["yaml"], "OUTPUT_DIR", folder, "SEED", str(seed)])
    runs = [weights(tmp_path / name) for name in "abc"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, configs, kind, capsys):
    other = tmp_path / "other.pth"
    good = experiment(config.load(configs[kind])).build_model().state_dict()
    torch.save({**good, "score.weight": torch.zeros(7, 8), "score.bias": torch.zeros(7)}, other)
    key = {"yaml": "MODEL.WEIGHTS", "lazy": "train.init_checkpoint"}[kind]
    count = {"yaml": "MODEL.ROI_HEADS.NUM_CLASSES", "lazy": "model.num_classes"}[kind]
    data = {"yaml": "DATASETS.CUSTOM.VAL.JSON", "lazy": "datasets.val.json"}[kind]
    cases = [
        (["--eval-only"], "needs weights"),
        (["--eval-only", key, str(tmp_path / "none.pth")], "none.pth does not exist"),
        (["--eval-only", key, str(other)], "score.weight has shape (7, 8)"),
        (["--eval-only", count, "9", key, str(other)], count),
        (["--eval-only", data, str(tmp_path / "none.json"), key, str(other)], "none.json"),
        (["--num-gpus", "64", "--device", "cuda"], "--num-gpus 64"),
        (["--no-such-flag"], "--no-such-flag"),
        (["nonsense.key=3"], "nonsense.key"),
    ]
    for arguments, words in cases:
        command = ["--config-file", configs[kind], *arguments]
        capsys.readouterr()
        assert run_tool(lambda command=command: main(command)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert words in error, error


def test_output_folder_that_cannot_be_written(tmp_path, configs):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        main(["--config-file", configs["yaml"], "OUTPUT_DIR", str(tmp_path / "file" / "run")])


def test_two_processes_from_the_shell(tmp_path, configs, repo_root):
    """The script itself, in a fresh interpreter: two CPU workers, which are interpreters too. Then
    a mistake inside of them.
    """
    script = str(repo_root / "tools" / "train_net.py")
    words = [script, "--config-file", configs["lazy"], "--num-gpus", "2", "--device", "cpu"]
    path = os.pathsep.join([str(repo_root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "iter 4/4" in done.stdout
    assert "2 process(es)" in done.stdout
    out = tmp_path / "out_lazy"
    assert checkpoint.read(out / "model_final.pth")["iteration"] == 3
    assert (out / "log.txt.rank1").is_file()
    # two processes see the same images in the same order: only the rounding of sums differs
    main(["--config-file", configs["lazy"], f"train.output_dir={tmp_path / 'one'}"])
    expected = rows(tmp_path / "one")[-1]
    for name in ("total_loss", "lr", "bbox/AP"):
        assert rows(out)[-1][name] == pytest.approx(expected[name], rel=0.05), name

    words += ["--eval-only", f"train.init_checkpoint={tmp_path / 'none.pth'}"]
    log = tmp_path / "log"
    assert Command(words, log=log, environ=environment, cwd=tmp_path).wait(120) == 2
    assert "Traceback" not in log.read_text()
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "none.pth does not exist" in errors[0]


def test_tiny_fscascade_end_to_end_is_the_same_from_both_kinds(tmp_path):
    """A real model on generated pictures: two steps and an evaluation from each kind of config."""
    shapes.generate(output_dir=tmp_path, split="train", count=6, size=96, seed=1)
    json_file = str(tmp_path / "annotations" / "instances_train.json")
    images = str(tmp_path / "images" / "train")
    values = {
        "lazy": ["datasets.{0}.json", "datasets.{0}.images", "train.output_dir"],
        "yaml": ["DATASETS.CUSTOM.{0}.JSON", "DATASETS.CUSTOM.{0}.IMAGES", "OUTPUT_DIR"],
    }
    shared = {
        "lazy": ["train.max_iter=2", "dataloader.train.total_batch_size=2", "train.eval_period=2"],
        "yaml": ["SOLVER.MAX_ITER=2", "SOLVER.IMS_PER_BATCH=2", "TEST.EVAL_PERIOD=2"],
    }
    # a yaml's warm-up is counted in iterations, a lazy one is a share of the training
    shared["lazy"] += ["lr_multiplier.warmup_length=1.0"]
    names = {"lazy": "FSCascade/fscascade_tiny_shapes", "yaml": None}
    names["yaml"] = str(model_zoo.get_config_file(names["lazy"], "yaml"))
    for kind, (json_key, images_key, output_key) in values.items():
        command = ["--config-file", names[kind], "--device", "cpu", *shared[kind]]
        command += [f"{output_key}={tmp_path / kind}"]
        for slot in ("train", "val"):
            slot = slot.upper() if kind == "yaml" else slot
            command += [json_key.format(slot), json_file, images_key.format(slot), images]
        assert main(command) == 0
    one, two = (weights(tmp_path / kind) for kind in KINDS)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    found = [{row["iteration"]: row for row in rows(tmp_path / kind)}[1] for kind in KINDS]
    assert found[0]["total_loss"] == found[1]["total_loss"] > 0
    assert found[0]["bbox/AP"] == found[1]["bbox/AP"]
