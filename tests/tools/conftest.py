"""A tiny dataset, and the same tiny training described by both kinds of config."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from tests.tools import tiny_detector  # noqa: F401  registers the model for yaml configs

YAML = """
MODEL: {{META_ARCHITECTURE: TinyDetector, DEVICE: cpu, ROI_HEADS: {{NUM_CLASSES: auto}}}}
DATASETS:
  CUSTOM:
    TRAIN: {{JSON: {json}, IMAGES: {images}}}
    VAL: {{JSON: {json}, IMAGES: {images}}}
INPUT: {{MIN_SIZE_TRAIN: [32], MIN_SIZE_TEST: 32, MAX_SIZE_TRAIN: 64, MAX_SIZE_TEST: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER:
  IMS_PER_BATCH: 4
  MAX_ITER: 4
  OPTIMIZER: AdamW
  BASE_LR: 0.01
  WEIGHT_DECAY: 0.05
  WEIGHT_DECAY_NORM: 0.0
  LR_SCHEDULER_NAME: WarmupPolyLR
  WARMUP_ITERS: 2
  ACCUMULATION_STEPS: 2
  CHECKPOINT_PERIOD: 2
  CHECKPOINT_KEEP: 3
  AMP: {{ENABLED: true, DTYPE: bfloat16}}
  CLIP_GRADIENTS: {{ENABLED: true, CLIP_TYPE: full_model, CLIP_VALUE: 0.5}}
  EMA: {{ENABLED: true, DECAY: 0.9, WARMUP: true}}
TRAIN: {{LOG_PERIOD: 2, CHANNELS_LAST: true}}
TEST: {{EVAL_PERIOD: 2, BEST_METRIC: bbox/AP50, EARLY_STOP_PATIENCE: 9}}
SEED: 5
OUTPUT_DIR: {output}
VERSION: 2
"""

LAZY = """
from detectron2.config import LazyCall as L
from d2dense.config import common
from d2dense.data import augmentations
from tests.tools.tiny_detector import TinyDetector

model = L(TinyDetector)(num_classes="auto")
datasets = dict(
    train=dict(json={json!r}, images={images!r}), val=dict(json={json!r}, images={images!r})
)
size = dict(min_size=(32,), max_size=64)
dataloader = common.detection_loader(
    train_augmentations=L(augmentations.default)(is_train=True, **size),
    test_augmentations=L(augmentations.default)(is_train=False, **size),
    batch_size=4,
    workers=0,
)
optimizer = common.adamw(lr=0.01, weight_decay=0.05)
lr_multiplier = common.poly(max_iter=4, warmup_iters=2)
train = common.train(
    device="cpu",
    max_iter=4,
    accumulation_steps=2,
    checkpointer=dict(period=2, max_to_keep=3),
    amp=dict(enabled=True, dtype="bfloat16"),
    clip_gradients=dict(enabled=True, clip_type="full_model", clip_value=0.5),
    ema=dict(enabled=True, decay=0.9, warmup=True),
    log_period=2,
    channels_last=True,
    eval_period=2,
    best=dict(metric="bbox/AP50"),
    early_stop_patience=9,
    seed=5,
    output_dir={output!r},
)
"""


@pytest.fixture(autouse=True)
def _quiet_logging():
    """The command line sets up the root logger; leave it as it was."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [each for each in root.handlers if hasattr(each, "_d2dense_handler")]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture(scope="session")
def coco_set(tmp_path_factory):
    """Six pictures of 48 x 32 with one or two boxes each, in COCO's format."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(6):
        name = f"{index}.png"
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))
        images.append({"id": index, "file_name": name, "height": 32, "width": 48})
        for each in range(1 + index % 2):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1 + (index + each) % 3,
                    "bbox": [4 + each, 4, 24, 16],
                    "area": 24 * 16,
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(("a", "b", "c"))],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return SimpleNamespace(json=str(folder / "instances.json"), images=str(folder))


@pytest.fixture
def configs(tmp_path, coco_set):
    """Paths of the yaml and the lazy config; outputs go to ``out_yaml`` and ``out_lazy``."""
    return write_configs(tmp_path, coco_set)


def write_configs(folder, coco_set):
    result = {}
    for kind, text, suffix in (("yaml", YAML, "yaml"), ("lazy", LAZY, "py")):
        path = folder / f"tiny.{suffix}"
        output = str(folder / f"out_{kind}")
        path.write_text(text.format(json=coco_set.json, images=coco_set.images, output=output))
        result[kind] = str(path)
    return result
