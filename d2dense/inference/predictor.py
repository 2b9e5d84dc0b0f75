"""From a config of either kind, or a model-zoo name, to predictions on pictures."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from d2dense import checkpoint, config
from d2dense.data import augmentations, mappers
from d2dense.data.reading import read_image
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError

__all__ = ["Predictor"]

logger = logging.getLogger(__name__)

Picture = str | os.PathLike | np.ndarray
# What a mapper says of how it prepares a picture.
_OF_MAPPER = ("augmentations", "image_format")


class Predictor:
    """A model with the preprocessing of its config.

    Attributes:
        cfg: the resolved config.
        model: on ``device``, in eval mode; where the config asks for several sizes in tests, a
            :class:`~d2dense.modeling.MultiScaleDetector` of it.
        metadata: class names and colours of the config's first test set; without names where the
            config's datasets are not known here.
    """

    def __init__(
        self,
        config_or_name: str | Path | CfgNode | DictConfig,
        weights: str | os.PathLike | None = None,
        device: str | None = None,
        overrides: Sequence[str] = (),
        *,
        batch_size: int = 8,
    ):
        """
        Args:
            config_or_name: config file of either kind, model-zoo name, or a loaded config.
            weights: checkpoint of the whole model. None takes the config's own checkpoint where
                that is a local file or was set by ``overrides``; otherwise the model stays
                untrained, with a warning (what configs fetch from elsewhere is a backbone to
                start training from).
            device: where to predict; by default the config's device, or the CPU without a GPU.
            overrides: config changes in either spelling.
            batch_size: how many pictures of a list go through the model at once. Pictures of
                different sizes are padded to a common one, as Detectron2 does in training.

        Raises:
            UserError: an unknown name or key, or weights that are missing or do not fit.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; at least 1 is needed")
        self.batch_size = batch_size
        cfg = _loaded(config_or_name, overrides)
        self.cfg, self.device, own_weights, allow_pickle, names = _resolve(cfg, device)
        self.metadata = _metadata(names)
        self.augmentations, self.image_format = _preprocessing(self.cfg)
        if config.is_multi_scale(self.cfg):  # the model resizes
            self.augmentations = T.AugmentationList([])
        self.model = config.build_model(self.cfg, device=self.device)
        path = weights if weights is not None else _usable(own_weights, overrides)
        if path:
            report = checkpoint.load_weights(self.model, path, allow_pickle=allow_pickle)
            report.require_complete()
        else:
            logger.warning("no weights given: the model is untrained and predicts at random")
        self.model = config.for_tests(self.cfg, self.model.eval())

    def __call__(self, pictures: Picture | Sequence[Picture]) -> dict | list[dict]:
        """Predict.

        Args:
            pictures: a path, a BGR uint8 array (H, W, 3), or a list of them. The EXIF orientation
                of files is applied.

        Returns:
            Detectron2's output dict (``instances``, ``sem_seg``, ``panoptic_seg``) at the picture's
            own size, or a classifier's ``class_scores`` (K,), on the model's device; a list of them
            for a list.

        Raises:
            UserError: a file that cannot be read, or an array of another kind.
        """
        if isinstance(pictures, str) or not isinstance(pictures, Sequence):
            return self._predict([pictures])[0]
        outputs: list[dict] = []
        for start in range(0, len(pictures), self.batch_size):
            outputs += self._predict(pictures[start : start + self.batch_size])
        return outputs

    def preprocess(self, picture: Picture) -> dict[str, Any]:
        """Return the model's input for one picture: ``image`` (C, H', W') and the original size."""
        image = _to_bgr(picture)
        height, width = image.shape[:2]
        inputs = T.AugInput(_to_format(image, self.image_format))
        self.augmentations(inputs)
        tensor = torch.from_numpy(np.array(inputs.image.transpose(2, 0, 1), order="C"))  # a copy
        return {"image": tensor, "height": height, "width": width}

    def _predict(self, pictures: Sequence[Picture]) -> list[dict]:
        with torch.no_grad():
            return self.model([self.preprocess(picture) for picture in pictures])


def _loaded(config_or_name, overrides: Sequence[str]) -> CfgNode | DictConfig:
    if not isinstance(config_or_name, (CfgNode, DictConfig)):
        return config.load(config_or_name, overrides)
    cfg = copy.deepcopy(config_or_name)
    if isinstance(cfg, CfgNode):
        cfg.defrost()
    config.apply(cfg, overrides)
    return cfg


def _resolve(cfg: CfgNode | DictConfig, device: str | None):
    """Return the config with its datasets settled, the device, the config's checkpoint, whether
    pickles may be read, and the dataset names.

    Predicting needs no data: where datasets are missing, the config is used as it is and class
    names stay unknown.
    """
    try:
        run = experiment(cfg, device=device, training=False)
    except UserError as error:
        logger.warning("class names are unknown: %s", error)
        return (cfg, *_settings(cfg, device), [])
    settings = run.settings
    names = [*run.test_names, *run.train_names]
    return run.cfg, settings.device, settings.init_checkpoint, settings.allow_pickle, names


def _settings(cfg: CfgNode | DictConfig, device: str | None) -> tuple[str, str, bool]:
    if config.kind_of(cfg) == "yaml":
        own, weights, allow_pickle = cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.TRAIN.ALLOW_PICKLE
    else:
        own = str(OmegaConf.select(cfg, "train.device") or "cuda")
        weights = OmegaConf.select(cfg, "train.init_checkpoint") or ""
        allow_pickle = bool(OmegaConf.select(cfg, "train.allow_pickle"))
    return device or config.resolve_device(own), weights, allow_pickle


def _usable(path: str, overrides: Sequence[str]) -> str:
    """Return the config's own checkpoint if it is one to predict with, else an empty string."""
    is_asked_for = any(
        key in item for item in overrides for key in ("MODEL.WEIGHTS", "init_checkpoint")
    )
    return path if is_asked_for or "://" not in path else ""


def _metadata(names: Sequence[str]) -> Metadata:
    """Return the catalog entry of the first dataset with class names, or an empty one."""
    for name in names:
        metadata = MetadataCatalog.get(name)
        if any(metadata.get(f"{kind}_classes") for kind in ("thing", "stuff", "image")):
            return metadata
    return Metadata(name="unknown")


def _preprocessing(cfg: CfgNode | DictConfig) -> tuple[T.AugmentationList, str]:
    """Return what the config's test loader does to a picture, and the channel order it wants."""
    if config.kind_of(cfg) == "yaml":
        mapper = mappers.from_cfg(cfg, is_train=False)
    else:
        node = OmegaConf.select(cfg, "dataloader.test.mapper")
        if node is None:
            model_format = OmegaConf.select(cfg, "model.input_format")
            steps = T.AugmentationList(augmentations.default(is_train=False))
            return steps, model_format or "BGR"
        mapper = instantiate(node)
    steps, image_format = (getattr(mapper, name, None) for name in _OF_MAPPER)
    if steps is None or image_format is None:
        raise UserError(
            f"the mapper of the test images is a {type(mapper).__name__}, which does not say how "
            f"it prepares a picture; give it the attributes {' and '.join(_OF_MAPPER)}, as "
            "Detectron2's DatasetMapper has them"
        )
    return steps, image_format


def _to_bgr(picture: Picture) -> np.ndarray:
    if isinstance(picture, (str, os.PathLike)):
        return read_image({"file_name": os.fspath(picture)}, "BGR")
    if not isinstance(picture, np.ndarray):
        raise UserError(
            f"a picture is a {type(picture).__name__}, expected a path or a BGR uint8 array"
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise UserError(
            f"a picture is an array {picture.shape} of {picture.dtype}, expected BGR (H, W, 3) of "
            "uint8, as cv2.imread returns"
        )
    if 0 in picture.shape:
        raise UserError(f"a picture is empty: {picture.shape}")
    return picture


def _to_format(bgr: np.ndarray, image_format: str) -> np.ndarray:
    if image_format == "BGR":
        return bgr
    rgb = np.ascontiguousarray(bgr[:, :, ::-1])
    if image_format == "RGB":
        return rgb
    return detection_utils.convert_PIL_to_numpy(Image.fromarray(rgb), image_format)
