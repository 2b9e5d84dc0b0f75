"""A trained model with its test images, from a config of either kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2dense import checkpoint, config
from d2dense.data import loaders, mappers
from d2dense.data.mappers import DetectionMapper, SemanticMapper
from d2dense.data.records import Records
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError
from d2dense.evaluation.base import image_key
from d2dense.modeling.mask2former import Mask2Former

__all__ = [
    "DETECTORS",
    "SEGMENTERS",
    "Subject",
    "annotated_records",
    "distinct_names",
    "open_subject",
    "records_of",
]

# What a model is for, by the mapper that its test images go through.
DETECTORS, SEGMENTERS = "detectors", "semantic segmenters"
_KINDS = {DetectionMapper: DETECTORS, SemanticMapper: SEGMENTERS}


@dataclass(frozen=True)
class Subject:
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
    mapper: DetectionMapper | SemanticMapper
    num_workers: int

    def test_images(self, records: Records) -> Iterable[list[dict[str, Any]]]:
        """Return a loader of the model's inputs in tests, one image at a time."""
        return self._loader(records, self.mapper)

    @torch.no_grad()
    def predictions(self, records: Records) -> Iterator[dict[str, Any]]:
        """Yield the model's output for each image, at the image's own size."""
        for (sample,) in self.test_images(records):
            yield self.model([sample])[0]

    def labelled_images(self, records: Records) -> Iterator[dict[str, Any]]:
        """Yield what the model takes in training, resized as in tests and without any other
        augmentation. Crowds are left out.
        """
        mapper: SemanticMapper | DetectionMapper
        common: dict[str, Any] = {
            "is_train": True,
            "augmentations": [self.mapper.augmentations],
            "image_format": self.mapper.image_format,
            "ignore_label": self.mapper.ignore_label,
        }
        if isinstance(self.mapper, SemanticMapper):
            mapper = SemanticMapper(**common)
        else:
            mapper = DetectionMapper(
                use_instance_mask=self.mapper.use_instance_mask or _learns_masks(self.model),
                instance_mask_format=self.mapper.instance_mask_format,
                **common,
            )
        for (sample,) in self._loader(records, mapper):
            yield sample

    def _loader(self, records: Records, mapper: Callable) -> Iterable[list[dict[str, Any]]]:
        return loaders.build_test_loader(
            dataset=records, mapper=mapper, num_workers=self.num_workers
        )


def _learns_masks(model: nn.Module) -> bool:
    return isinstance(model, Mask2Former) or any(hasattr(m, "mask_head") for m in model.modules())


def open_subject(
    config_file: str | Path,
    *,
    weights: str | Path | None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    dataset: str | None = None,
    name: str = "",
    kinds: Sequence[str] = (DETECTORS,),
) -> Subject:
    """Build the model of a config with trained weights.

    Args:
        config_file: path or model-zoo name.
        weights: checkpoint; None takes the config's.
        dataset: registered name that takes the place of the config's test sets.
        name: by default the config's.
        kinds: of models that the analysis is for.

    Raises:
        UserError: another kind of model, no weights, or weights, classes, a test set or a loader
            that do not fit.
    """
    cfg = config.load(config_file, overrides)
    if dataset is not None:
        _set_test_set(cfg, dataset)
    mapper = _test_mapper(cfg)
    if _KINDS.get(type(mapper)) not in kinds:
        known = [kind.__name__ for kind, name in _KINDS.items() if name in kinds]
        raise UserError(
            f"{config_file} reads its test set by {type(mapper).__name__}; this analysis is for "
            f"{' and '.join(kinds)}, whose dataloader.test.mapper is a {' or '.join(known)}"
        )
    run = experiment(cfg, device=device, training=False)
    if len(run.test_names) != 1:
        raise UserError(
            f"{config_file} has the test sets {run.test_names}; choose one with --dataset"
        )
    (dataset,) = run.test_names
    workers = getattr(run.build_test_loader(dataset), "num_workers", 0)
    weights = weights or run.settings.init_checkpoint
    if not weights:
        raise UserError(f"{config_file}: trained weights are needed, give --weights FILE")
    model = run.build_model()
    report = checkpoint.load_weights(model, weights, allow_pickle=run.settings.allow_pickle)
    report.require_complete()
    return Subject(name or Path(config_file).stem, model.eval(), dataset, mapper, workers)


def _test_mapper(cfg: CfgNode | DictConfig) -> Any:
    if config.kind_of(cfg) == "yaml":
        return mappers.from_cfg(cfg, is_train=False)
    node = OmegaConf.select(cfg, "dataloader.test.mapper")
    return None if node is None else instantiate(node)


def _set_test_set(cfg: CfgNode | DictConfig, name: str) -> None:
    if config.kind_of(cfg) == "lazy":
        OmegaConf.update(cfg, "dataloader.test.dataset.names", name, force_add=True)
    else:
        cfg.DATASETS.TEST = (name,)


def annotated_records(dataset: str, count: int | None = None) -> Records:
    """Return the images of a dataset, of detection only those that have objects (crowds do not
    count), the first ``count`` of them.

    Raises:
        UserError: an unknown dataset, missing files, or no such image.
    """
    records = loaders.get_dataset_dicts(names=dataset, filter_empty=True)
    return records if count is None else records.select(np.arange(min(count, len(records))))


def records_of(dataset: str, image_ids: Sequence[str]) -> Records:
    """Return the images with these ids (``image_id`` as text, else ``file_name``), in this order.

    Raises:
        UserError: an image that is not in the dataset, or that has no objects.
    """
    records = annotated_records(dataset)
    places = {str(image_key(record)): index for index, record in enumerate(records)}
    if not image_ids:
        raise UserError("the ranking names no image; keep more of them")
    for each in image_ids:
        if each not in places:
            raise UserError(
                f"image {each} of the ranking is not among those with objects in {dataset}; rank "
                "the images of the same dataset"
            )
    return records.select(np.array([places[each] for each in image_ids]))


def distinct_names(subjects: Sequence[Subject]) -> list[Subject]:
    """Number the names that come more than once."""
    names = [each.name for each in subjects]
    return [
        replace(each, name=f"{each.name} {k + 1}") if names.count(each.name) > 1 else each
        for k, each in enumerate(subjects)
    ]
