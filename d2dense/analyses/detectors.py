"""A detector with its weights and its test images, from a config of either kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2dense import checkpoint, config
from d2dense.data import loaders
from d2dense.data.mappers import DetectionMapper
from d2dense.data.records import Records
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError
from d2dense.evaluation.base import image_key

__all__ = ["Detector", "annotated_records", "distinct_names", "open_detector", "records_of"]


@dataclass(frozen=True)
class Detector:
    """
    Attributes:
        name: in figures and tables
        model: on its device, in eval mode
        dataset: registered name of the test set
        mapper: the config's for tests
        num_workers: processes that read images
    """

    name: str
    model: nn.Module
    dataset: str
    mapper: DetectionMapper
    num_workers: int

    def test_images(self, records: Records) -> Iterable[list[dict[str, Any]]]:
        """Return a loader of the model's inputs in tests, one image at a time."""
        return self._loader(records, self.mapper)

    def labelled_images(self, records: Records) -> Iterator[dict[str, Any]]:
        """Yield what the model takes in training, resized as in tests and without any other
        augmentation. Crowds are left out.
        """
        has_masks = any(hasattr(module, "mask_head") for module in self.model.modules())
        mapper = DetectionMapper(
            is_train=True,
            augmentations=[self.mapper.augmentations],
            image_format=self.mapper.image_format,
            use_instance_mask=self.mapper.use_instance_mask or has_masks,
            instance_mask_format=self.mapper.instance_mask_format,
        )
        for (sample,) in self._loader(records, mapper):
            yield sample

    def _loader(self, records: Records, mapper: Callable) -> Iterable[list[dict[str, Any]]]:
        return loaders.build_test_loader(
            dataset=records, mapper=mapper, num_workers=self.num_workers
        )


def open_detector(
    config_file: str | Path,
    *,
    weights: str | Path | None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    dataset: str | None = None,
    name: str = "",
) -> Detector:
    """Build the model of a config with trained weights.

    Args:
        config_file: path or model-zoo name.
        weights: checkpoint; None takes the config's.
        dataset: registered name that takes the place of the config's test sets.
        name: by default the config's.

    Raises:
        UserError: no weights, or weights, classes, a test set or a loader that do not fit.
    """
    cfg = config.load(config_file, overrides)
    if dataset is not None:
        _set_test_set(cfg, dataset)
    run = experiment(cfg, device=device, training=False)
    if len(run.test_names) != 1:
        raise UserError(
            f"{config_file} has the test sets {run.test_names}; choose one with --dataset"
        )
    (dataset,) = run.test_names
    loader = run.build_test_loader(dataset)
    mapper = getattr(getattr(loader, "dataset", None), "mapper", None)
    if not isinstance(mapper, DetectionMapper):
        raise UserError(
            f"{config_file} reads its test set by {type(mapper or loader).__name__}; analyses need "
            "a detector whose dataloader.test.mapper is a d2dense.data.mappers.DetectionMapper"
        )
    weights = weights or run.settings.init_checkpoint
    if not weights:
        raise UserError(f"{config_file}: trained weights are needed, give --weights FILE")
    model = run.build_model()
    report = checkpoint.load_weights(model, weights, allow_pickle=run.settings.allow_pickle)
    report.require_complete()
    name = name or Path(config_file).stem
    return Detector(name, model.eval(), dataset, mapper, getattr(loader, "num_workers", 0))


def _set_test_set(cfg: CfgNode | DictConfig, name: str) -> None:
    if config.kind_of(cfg) == "lazy":
        OmegaConf.update(cfg, "dataloader.test.dataset.names", name, force_add=True)
    else:
        cfg.DATASETS.TEST = (name,)


def annotated_records(dataset: str, count: int | None = None) -> Records:
    """Return the images of a data set that have objects (crowds do not count), the first ``count``
    of them.

    Raises:
        UserError: an unknown data set, missing files, or no such image.
    """
    records = loaders.get_dataset_dicts(names=dataset, filter_empty=True)
    return records if count is None else records.select(np.arange(min(count, len(records))))


def records_of(dataset: str, image_ids: Sequence[str]) -> Records:
    """Return the images with these ids (``image_id`` as text, else ``file_name``), in this order.

    Raises:
        UserError: an image that is not in the data set, or that has no objects.
    """
    records = annotated_records(dataset)
    places = {str(image_key(record)): index for index, record in enumerate(records)}
    if not image_ids:
        raise UserError("the ranking names no image; keep more of them")
    for each in image_ids:
        if each not in places:
            raise UserError(
                f"image {each} of the ranking is not among those with objects in {dataset}; rank "
                "the images of the same data set"
            )
    return records.select(np.array([places[each] for each in image_ids]))


def distinct_names(detectors: Sequence[Detector]) -> list[Detector]:
    """Number the names that come more than once."""
    names = [each.name for each in detectors]
    return [
        replace(each, name=f"{each.name} {k + 1}") if names.count(each.name) > 1 else each
        for k, each in enumerate(detectors)
    ]
