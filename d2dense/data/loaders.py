"""Batches for training and evaluation.

The training stream is fixed by its seed alone: the k-th sample of a run is the same image under the
same random augmentation for any number of workers and, at equal total batch size without
aspect-ratio grouping, any number of processes. Each sample draws its randomness from (seed,
position in the stream), so a run can be continued in the middle by skipping batches without reading
them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils import data as torchdata

from d2dense.errors import UserError

from . import datasets, mappers
from .reading import SampleError

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "get_dataset_dicts",
    "test_from_cfg",
    "train_from_cfg",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def get_dataset_dicts(*, names: str | Sequence[str], filter_empty: bool = True) -> list[Record]:
    """Return the records of one or several registered datasets, joined.

    Args:
        names: registered names.
        filter_empty: leave out images without a usable (non-crowd) object. Semantic datasets are
            not touched.

    Raises:
        UserError: an unknown name, missing files, or nothing left.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no dataset is named; set DATASETS.TRAIN / dataloader.train.dataset.names")
    records = [record for name in names for record in datasets.load(name)]
    if filter_empty:
        kept = [r for r in records if "annotations" not in r or _has_object(r)]
        if len(kept) < len(records):
            logger.info(
                "%s: left out %d images without objects, %d stay",
                ", ".join(names),
                len(records) - len(kept),
                len(kept),
            )
        records = kept
    if not records:
        raise UserError(
            f"datasets {', '.join(names)} have no image to use"
            + ("; every image is without objects" if filter_empty else "")
        )
    return records


def _has_object(record: Record) -> bool:
    return any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])


def build_train_loader(
    *,
    dataset: Sequence[Record] | str,
    mapper: Callable[[Record], Record],
    total_batch_size: int,
    num_workers: int = 4,
    seed: int | None = None,
    aspect_ratio_grouping: bool = True,
    sampler: str = "training",
    repeat_threshold: float = 0.001,
    start_batch: int = 0,
) -> torchdata.DataLoader:
    """Return an endless loader of lists of mapped records.

    Args:
        dataset: records, as from :func:`get_dataset_dicts`, or a registered name.
        mapper: maps a record to what the model takes; it must always return a sample.
        total_batch_size: images per step over all processes.
        num_workers: processes that read ahead, per training process; 0 reads in the training
            process.
        seed: fixes order and augmentations; None or a negative number draws one that all processes
            share.
        aspect_ratio_grouping: batches hold only wide or only tall images, which saves padding.
        sampler: ``"training"`` (each image once per epoch) or ``"repeat_factor"`` (images of rare
            classes more often, as LVIS does).
        repeat_threshold: frequency below which a class counts as rare.
        start_batch: how many batches of the stream to skip, without reading them.

    Raises:
        UserError: a batch that the processes cannot share, or an unknown sampler. While iterating,
            a :class:`~d2dense.data.reading.SampleError` that names the broken file.
    """
    records = get_dataset_dicts(names=dataset) if isinstance(dataset, str) else list(dataset)
    world_size = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world_size:
        raise UserError(
            f"total batch size {total_batch_size} cannot be shared by {world_size} processes; "
            "change SOLVER.IMS_PER_BATCH / dataloader.train.total_batch_size to a multiple"
        )
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
    batches = _BatchSampler(
        _index_sampler(records, sampler, repeat_threshold, seed),
        [_is_wide(record) for record in records] if aspect_ratio_grouping else None,
        total_batch_size // world_size,
        start_batch,
    )
    return _Loader(
        _SeededDataset(DatasetFromList(records, copy=False), mapper, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_single_threaded,
    )


def build_test_loader(
    *,
    dataset: Sequence[Record] | str,
    mapper: Callable[[Record], Record],
    batch_size: int = 1,
    num_workers: int = 4,
) -> torchdata.DataLoader:
    """Return a loader that yields every record once, in order, shared out among the processes.

    Args:
        dataset: records, or a registered name (images without objects stay).
        mapper: built with ``is_train=False``.
        batch_size: images per batch and process; the last batch may be smaller.
        num_workers: as in :func:`build_train_loader`.

    Raises:
        UserError: as :func:`get_dataset_dicts`; while iterating, a SampleError that names the
            broken file.
    """
    if isinstance(dataset, str):
        dataset = get_dataset_dicts(names=dataset, filter_empty=False)
    records = DatasetFromList(list(dataset), copy=False)
    return _Loader(
        _MappedDataset(records, mapper),
        batch_size=batch_size,
        sampler=InferenceSampler(len(records)),
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_single_threaded,
    )


def train_from_cfg(cfg: CfgNode, start_batch: int = 0) -> torchdata.DataLoader:
    """Build the training loader of a yacs config.

    Raises:
        UserError: a batch that the processes cannot share, or an unknown sampler.
    """
    names = {"TrainingSampler": "training", "RepeatFactorTrainingSampler": "repeat_factor"}
    if cfg.DATALOADER.SAMPLER_TRAIN not in names:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN = {cfg.DATALOADER.SAMPLER_TRAIN!r}, expected {sorted(names)}"
        )
    return build_train_loader(
        dataset=get_dataset_dicts(
            names=cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        ),
        mapper=mappers.from_cfg(cfg, is_train=True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        sampler=names[cfg.DATALOADER.SAMPLER_TRAIN],
        repeat_threshold=cfg.DATALOADER.REPEAT_THRESHOLD,
        start_batch=start_batch,
    )


def test_from_cfg(cfg: CfgNode, name: str) -> torchdata.DataLoader:
    """Build the loader of the test set ``name`` of a yacs config."""
    return build_test_loader(
        dataset=name,
        mapper=mappers.from_cfg(cfg, is_train=False),
        batch_size=cfg.DATALOADER.TEST_BATCH_SIZE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _index_sampler(
    records: list[Record], kind: str, threshold: float, seed: int
) -> torchdata.Sampler:
    if kind == "training":
        return TrainingSampler(len(records), seed=seed)
    if kind == "repeat_factor":
        if any("annotations" not in record for record in records):
            raise UserError(
                "the repeat-factor sampler needs a dataset with objects; use 'training'"
            )
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, threshold
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise UserError(f"sampler = {kind!r}, expected 'training' or 'repeat_factor'")


def _is_wide(record: Record) -> bool:
    """Whether the image is wider than high; datasets without sizes count as one group."""
    return record.get("width", 0) > record.get("height", 0)


class _BatchSampler(torchdata.Sampler):
    """Batches of (position in the stream, record index), grouped by aspect ratio if ``is_wide`` is
    given.
    """

    def __init__(
        self,
        sampler: torchdata.Sampler,
        is_wide: list[bool] | None,
        batch_size: int,
        start_batch: int,
    ):
        self.sampler = sampler
        self.is_wide = is_wide
        self.batch_size = batch_size
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start_batch, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        groups: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for count, index in enumerate(self.sampler):
            group = groups[self.is_wide is not None and self.is_wide[index]]
            group.append((rank + count * world_size, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class _MappedDataset(torchdata.Dataset):
    """Records through a mapper; a sample that cannot be used travels as its error to the main
    process.
    """

    def __init__(self, records: torchdata.Dataset, mapper: Callable[[Record], Record]):
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record | SampleError:
        try:
            return self.mapper(self.records[index])
        except SampleError as error:
            return error


class _SeededDataset(_MappedDataset):
    """Maps (position, index) with all random numbers fixed by (seed, position)."""

    def __init__(self, records: torchdata.Dataset, mapper: Callable[[Record], Record], seed: int):
        super().__init__(records, mapper)
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Record | SampleError:
        position, index = item
        with _seeded(self.seed, position):
            return super().__getitem__(index)


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Fix the global generators that augmentations draw from, and put them back afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would reseed CUDA too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class _Loader(torchdata.DataLoader):
    """A DataLoader that raises a worker's SampleError itself: one line, without the worker's
    traceback.
    """

    def __iter__(self) -> Iterator[list[Record]]:
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, SampleError):
                    raise sample
            yield batch


def _as_list(samples: list[Record]) -> list[Record]:
    return samples


def _single_threaded(worker: int) -> None:
    """Keep OpenCV from starting as many threads per worker as there are cores."""
    cv2.setNumThreads(0)
