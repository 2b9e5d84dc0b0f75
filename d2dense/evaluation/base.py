"""What every evaluator shares: a record per image, gathered and summarised in the main process."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from d2dense.errors import UserError

__all__ = ["ImageEvaluator", "image_key", "require"]


def image_key(image: Mapping[str, Any]) -> Hashable:
    """Identify one image of a loader's batch or of a dataset: ``image_id``, else ``file_name``."""
    for name in ("image_id", "file_name"):
        if name in image:
            return image[name]
    raise UserError(
        f"an image of the test set has the keys {sorted(image)} but neither image_id nor file_name;"
        " let the dataset's dicts and the mapper keep one of them"
    )


def require(package: str, feature: str, install: str) -> ModuleType:
    """Import ``package`` or say in one line which feature needs it and how to ``install`` it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{feature} needs the package {package} ({error}); run: {install}"
        ) from error


class ImageEvaluator(DatasetEvaluator):
    """Evaluator that keeps a small record per image and needs nothing but these records at the end.

    Records are stored by image, so a sampler that hands one image to two processes (to give each
    the same number of batches) does not count it twice, and the result is the same for any number
    of processes. Subclasses write :meth:`record` and :meth:`summarize`.
    """

    def __init__(self, dataset_name: str, *, output_dir: str | None = None):
        self.dataset_name = dataset_name
        self.output_dir = Path(output_dir) if output_dir else None
        self.metadata = MetadataCatalog.get(dataset_name)
        self.reset()

    def reset(self) -> None:
        self._records: dict[Hashable, Any] = {}

    def process(self, inputs, outputs) -> None:
        """Keep a record of each pair of loader dict and model output dict."""
        for image, output in zip(inputs, outputs):
            key = self.key(image)
            if key not in self._records:
                self._records[key] = self.record(image, output)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{task: {metric: value}}`` in the main process and ``{}`` in all others."""
        parts = comm.gather(self._records, dst=0)
        if not comm.is_main_process():
            return {}
        merged: dict[Hashable, Any] = {}
        for part in parts:
            for key, record in part.items():
                merged.setdefault(key, record)
        return self.summarize(merged)

    def key(self, image: Mapping[str, Any]) -> Hashable:
        """Return what identifies ``image`` within the dataset."""
        return image_key(image)

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> Any:
        """Return what :meth:`summarize` needs of one image: small, picklable, on the CPU."""
        raise NotImplementedError

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        """Turn the records of all images into ``{task: {metric: value}}``; main process only."""
        raise NotImplementedError

    def write(self, file_name: str, text: str) -> None:
        """Write ``text`` into the output folder; nothing without an output folder."""
        if self.output_dir is None:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / file_name).write_text(text)

    def output_of(self, output: Mapping[str, Any], key: str) -> Any:
        """Return ``output[key]``; a model that predicts something else is a :class:`UserError`."""
        if key not in output:
            raise UserError(
                f"the model returned {sorted(output)}, but the evaluation of {self.dataset_name!r} "
                f"needs {key!r}; test this model on a dataset of its own kind"
            )
        return output[key]
