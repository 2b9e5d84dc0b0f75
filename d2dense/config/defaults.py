"""The yacs keys that all projects share, on top of Detectron2's own. One comment per key; readers
are named.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as _detectron2_cfg

from d2dense import projects

__all__ = ["add_d2dense_config", "get_cfg"]


def get_cfg() -> CN:
    """Return Detectron2's default config with the shared keys and every project's keys added."""
    cfg = _detectron2_cfg()
    add_d2dense_config(cfg)
    projects.add_project_configs(cfg)
    return cfg


def add_d2dense_config(cfg: CN) -> None:
    """Add the shared keys to ``cfg`` in place (the lazy counterpart is
    :mod:`d2dense.config.common`).
    """
    _add_data_keys(cfg)
    _add_solver_keys(cfg)
    _add_run_keys(cfg)


def _add_data_keys(cfg: CN) -> None:
    # Datasets without Python: DATASETS.CUSTOM.TRAIN.JSON, ....IMAGES and so on, see
    # data/datasets.py. The slot TRAIN becomes the training set; VAL, TEST and every other slot
    # become test sets, unless the config names custom sets.
    cfg.DATASETS.CUSTOM = CN(new_allowed=True)
    # "check": the model's class count must equal the data's; "auto": it is taken from the data.
    cfg.DATASETS.CLASS_COUNT = "check"
    # Images per batch in evaluation, per process.
    cfg.DATALOADER.TEST_BATCH_SIZE = 1
    # Which recipe of data/augmentations.py the mapper uses: "default", "detr", "lsj" or "semantic".
    cfg.INPUT.MAPPER = "default"
    # Recompute boxes from the augmented masks (tighter after crops).
    cfg.INPUT.RECOMPUTE_BOXES = False
    # "detr": shorter sides to choose from before the crop, and the crop's size range in pixels.
    cfg.INPUT.DETR = CN({"CROP_MIN_SIZES": (400, 500, 600), "CROP_RANGE": (384, 600)})
    # "lsj": side of the square training image, and the range of its random scale.
    cfg.INPUT.LSJ = CN({"IMAGE_SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0})
    # "semantic": photometric distortion, and the largest share one class may have in a crop.
    cfg.INPUT.COLOR_DISTORTION = True
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0


def _add_solver_keys(cfg: CN) -> None:
    # "SGD" or "AdamW" (engine/experiment.py); BETAS are AdamW's.
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # Layer-wise lr decay: layer k of n gets lr * rate^(n - k); 1.0 is off.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Pairs [part of a parameter's name, factor on its lr]; the first match counts.
    cfg.SOLVER.LR_MULTIPLIERS = []
    # Parameters whose name holds one of these get no weight decay.
    cfg.SOLVER.NO_DECAY_NAMES = ()
    # LR_SCHEDULER_NAME "WarmupPolyLR": lr * (1 - t)^power, down to BASE_LR_END.
    cfg.SOLVER.POLY_POWER = 0.9
    # Autocast type: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batches of IMS_PER_BATCH / ACCUMULATION_STEPS whose gradients add up to one step.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # How many periodic checkpoints stay; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Exponential moving average of the weights: decay per step, ramped up when WARMUP, used in
    # evaluation when EVAL.
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.9998, "WARMUP": False, "EVAL": True})


def _add_run_keys(cfg: CN) -> None:
    cfg.TRAIN = CN()
    # Steps between two log lines; losses are read from the device only then.
    cfg.TRAIN.LOG_PERIOD = 20
    cfg.TRAIN.CHANNELS_LAST = False
    cfg.TRAIN.COMPILE = False
    # Recompute activations in backward for every module that offers set_grad_checkpointing().
    cfg.TRAIN.ACTIVATION_CHECKPOINTING = False
    cfg.TRAIN.FIND_UNUSED_PARAMETERS = False
    # Pickled model files can run code; they load only with this set.
    cfg.TRAIN.ALLOW_PICKLE = False
    # Metric that decides model_best.pth and early stop, e.g. "bbox/AP" or
    # "name_of_test_set/bbox/AP".
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.BEST_MODE = "max"
    # Evaluations without a new best before the run stops; 0 is off.
    cfg.TEST.EARLY_STOP_PATIENCE = 0
