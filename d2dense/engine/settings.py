"""What a run is told, the same for both kinds of config."""

from __future__ import annotations

from dataclasses import dataclass

from d2dense.errors import UserError

__all__ = ["RunSettings"]

_SEEDS = 2**31  # numpy takes 32 bits, and each process adds its number


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of one run; iterations are optimizer steps.

    Attributes:
        seed: -1 draws a new one every run.
        accumulation_steps: batches per optimizer step; each holds the global batch divided by this
        number.
        clip_type: ``value``, ``norm`` (of each parameter, as Detectron2 has it) or ``full_model``.
        ema_warmup, ema_time_constant: two ways to start with short averages, see
            :class:`~d2dense.engine.ema.ModelEMA`; 0 for none.
        checkpoint_keep: periodic checkpoints that stay, 0 for all.
        best_metric: ``task/metric``, or ``test_set/task/metric`` with several test sets; empty for
        none.
        early_stop_patience: evaluations without a new best before the run stops, 0 for never.
        allow_pickle: also load pickled model files, which can run code.
        reinit_misshaped: weights of ``init_checkpoint`` whose shape differs from the model's (the
            predictors of another number of classes) keep their fresh values instead of being an
            error; of queries, the rows that both have are loaded.
        init_classes: a dataset's name, or an annotation file with COCO's categories: the classes
            of ``init_checkpoint``. What belongs to a class of the same name is loaded then, and
            what else differs in shape stays fresh. Empty: their names are not known.
        total_batch_size: images per optimizer step over all processes; 0 where it is not known.
        lr_rule: ``none``, ``linear`` or ``sqrt``: how the learning rates follow
            ``total_batch_size / reference_batch_size``.
        reference_batch_size: the batch that the config's learning rates are meant for.
        non_finite_policy: ``raise`` ends the run at a loss or gradient that is NaN or infinite,
            ``skip`` leaves that step out.
        max_skipped_steps: with ``skip``, the run ends when more steps than this were left out.
        sharding: ``none`` (every process holds everything), ``zero1`` (each holds a part of the
            optimizer state) or ``fsdp`` (also of weights and gradients).
    """

    output_dir: str
    max_iter: int
    init_checkpoint: str = ""
    seed: int = -1
    device: str = "cuda"
    log_period: int = 20
    eval_period: int = 0
    checkpoint_period: int = 5000
    checkpoint_keep: int = 0
    amp_enabled: bool = False
    amp_dtype: str = "float16"
    accumulation_steps: int = 1
    clip_enabled: bool = False
    clip_type: str = "value"
    clip_value: float = 1.0
    clip_norm_type: float = 2.0
    ema_enabled: bool = False
    ema_decay: float = 0.9998
    ema_warmup: bool = False
    ema_time_constant: float = 0.0
    ema_eval: bool = True
    channels_last: bool = False
    compile: bool = False
    find_unused_parameters: bool = False
    activation_checkpointing: bool = False
    best_metric: str = ""
    best_mode: str = "max"
    early_stop_patience: int = 0
    allow_pickle: bool = False
    reinit_misshaped: bool = False
    init_classes: str = ""
    total_batch_size: int = 0
    lr_rule: str = "none"
    reference_batch_size: int = 16
    non_finite_policy: str = "raise"
    max_skipped_steps: int = 20
    sharding: str = "none"

    def __post_init__(self) -> None:
        choices = {
            "amp_dtype": ("float16", "bfloat16"),
            "clip_type": ("value", "norm", "full_model"),
            "best_mode": ("max", "min"),
            "lr_rule": ("none", "linear", "sqrt"),
            "non_finite_policy": ("raise", "skip"),
            "sharding": ("none", "zero1", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} = {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        for name in (
            "max_iter",
            "log_period",
            "checkpoint_period",
            "accumulation_steps",
            "reference_batch_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}, expected a positive number")
        if self.ema_time_constant < 0 or (self.ema_warmup and self.ema_time_constant):
            raise UserError(
                f"ema_time_constant = {self.ema_time_constant}, ema_warmup = {self.ema_warmup}: "
                "expected a number from 0, and only one of both (SOLVER.EMA / train.ema)"
            )
        if self.seed >= _SEEDS:
            raise UserError(
                f"seed = {self.seed}, expected a number below {_SEEDS}, or -1 for a new one "
                "every run"
            )
        if self.early_stop_patience and not self.best_metric:
            raise UserError(
                "early stop needs a metric to watch; set TEST.BEST_METRIC or train.best.metric"
            )
