"""The command line of training and evaluation, shared by ``tools/`` and every project.

Exit codes: 0 finished, 2 a mistake of the user (one line on stderr), 75 stopped by SIGTERM or
SIGUSR1 after the step and its checkpoint were done (``--resume`` goes on); anything else a defect.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils import comm

from d2dense import checkpoint, config, environment
from d2dense.checkpoint import CheckpointFolder
from d2dense.data.workers import clear_deaths
from d2dense.errors import ToolParser, UserError

from .checks import check_before_training
from .experiment import Experiment, experiment
from .launch import launch
from .logs import setup_logging
from .random_state import resolve_seed, seed_process
from .signals import EXIT_PREEMPTED, Preempted, StopRequest
from .together import decided_by_main
from .trainer import Trainer, evaluate_model

__all__ = ["main", "parser", "run"]

logger = logging.getLogger(__name__)

_EXAMPLES = """
examples:
  one GPU (or the CPU where there is none)
    %(prog)s --config-file FSCascade/fscascade_r50_fpn_1x
  eight GPUs, with two settings changed (both spellings work for both kinds of config)
    %(prog)s --config-file my.yaml --num-gpus 8 SOLVER.BASE_LR 0.01 OUTPUT_DIR runs/a
    %(prog)s --config-file my.py --num-gpus 8 optimizer.lr=0.01 train.output_dir=runs/b
  two machines; torchrun and srun need no such flags
    %(prog)s --config-file F --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
  days on machines that may fail: three restarts, each going on from the last checkpoint
    torchrun --nproc-per-node 8 --max-restarts 3 tools/train_net.py --config-file F --resume
  evaluate a checkpoint
    %(prog)s --config-file F --eval-only MODEL.WEIGHTS model_final.pth
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser; flags have Detectron2's names and meaning."""
    result = ToolParser(
        description="Train or evaluate the model of a config.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--config-file", required=True, metavar="F", help="yaml or py config, or model-zoo name")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--eval-only", action="store_true", help="evaluate the weights and stop")
    add("--num-gpus", type=int, default=1, help="processes per machine, one per GPU")
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="which machine this is, from 0")
    add("--dist-url", default="auto", help="where several machines meet, tcp://HOST:PORT")
    add("--device", help="cpu or cuda; replaces the config's device")
    add("overrides", nargs="*", metavar="KEY VALUE | key=value", help="changes of the config")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in as many processes as it asks for; return the exit code."""
    args = parser().parse_intermixed_args(argv)
    # opened here too, so that a wrong config is one message and not one per process
    cfg = config.load(args.config_file, args.overrides)
    if args.device is None:
        device = _device(cfg)
        # several GPUs were asked for: without them it is a mistake, not a run on the CPU
        args.device = device if args.num_gpus > 1 else config.resolve_device(device)
    elif args.num_gpus == 1:
        config.check_device(args.device)
    try:
        launch(run, args)
    except Preempted:
        return EXIT_PREEMPTED
    return 0


@clear_deaths()
def run(args: argparse.Namespace) -> dict[str, dict]:
    """Do one process's part: train, or evaluate with ``--eval-only``; return the last results."""
    cfg = config.load(args.config_file, args.overrides)
    exp = experiment(cfg, device=args.device, training=not args.eval_only)
    _setup(exp, args)
    if args.eval_only:
        return _evaluate(exp, resume=args.resume)
    # from here on: a signal while the model is built stops the run after its first step
    with StopRequest().listening() as stop:
        trainer = Trainer(exp, resume=args.resume or _is_restarted(exp), stop_request=stop)
        check_before_training(exp, trainer.model)
        return trainer.train()


def _is_restarted(exp: Experiment) -> bool:
    """Whether torchrun started this run again after a failure, and it has saved something by then;
    the same in all processes.

    Only the machine where the failure was counts a restart. A replaced machine counts none: a run
    that may lose one is to be started with ``--resume``.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    own = comm.is_main_process() and CheckpointFolder(exp.settings.output_dir).has_own()
    answers = comm.all_gather((restarted, own))
    return any(each for each, _ in answers) and any(each for _, each in answers)


def _device(cfg) -> str:
    if config.kind_of(cfg) == "lazy":
        return str((cfg.get("train") or {}).get("device", "cuda"))
    return str(cfg.MODEL.DEVICE)


def _setup(exp: Experiment, args: argparse.Namespace) -> None:
    """Create the output folder, start the log, and keep the config beside the results."""
    folder = Path(exp.settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        setup_logging(folder, rank=comm.get_rank())
        if comm.is_main_process():
            config.save(exp.cfg, folder / "config.yaml")
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written ({error.strerror}); "
            "set OUTPUT_DIR or train.output_dir"
        ) from error
    logger.info("command line: %s", shlex.join(sys.argv))
    logger.info("environment:\n%s", environment.collect())
    logger.info("resolved config: %s", folder / "config.yaml")


def _evaluate(exp: Experiment, *, resume: bool) -> dict[str, dict]:
    settings = exp.settings
    path: str | Path = settings.init_checkpoint
    if resume:
        # one process looks: a run that trains in this folder may save at the same moment
        path = decided_by_main(CheckpointFolder(settings.output_dir).last) or path
    if not path:
        raise UserError(
            "--eval-only needs weights: set MODEL.WEIGHTS or train.init_checkpoint, or add "
            "--resume to take the last checkpoint of the output folder"
        )
    if not exp.test_names:
        raise UserError(
            "--eval-only needs a test set: set DATASETS.TEST or dataloader.test.dataset.names"
        )
    seed_process(resolve_seed(settings.seed))
    model = exp.build_model()
    report = checkpoint.load_weights(model, path, allow_pickle=settings.allow_pickle)
    report.require_complete()
    return evaluate_model(exp, model) or {}
