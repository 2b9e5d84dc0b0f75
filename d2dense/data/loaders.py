"""Batches for training and evaluation.

The training stream is fixed by its seed alone: the k-th sample of a run is the same image under the
same random augmentation for any number of workers and, at equal total batch size without
aspect-ratio grouping, any number of processes. Each sample draws its randomness from (seed,
position in the stream), so a run can be continued in the middle by skipping batches without reading
them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils import data as torchdata

from d2dense.errors import UserError

from . import datasets, mappers, workers
from .copy_paste import CopyPaste, build_copy_paste
from .reading import SampleError, be_strict
from .records import Records
from .samples import BadSamples, Draw, MappedDataset, StreamDataset

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "get_dataset_dicts",
    "test_from_cfg",
    "train_from_cfg",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def get_dataset_dicts(*, names: str | Sequence[str], filter_empty: bool = True) -> Records:
    """Return the records of one or several registered datasets, joined.

    In a run of several processes all of them must call this together: one per machine reads the
    files, and the others share what it read.

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
    records = functools.reduce(operator.add, map(datasets.load_together, names))
    if filter_empty:
        kept = np.flatnonzero(~records.is_empty())
        if len(kept) < len(records):
            logger.info(
                "%s: left out %d images without objects, %d stay",
                ", ".join(names),
                len(records) - len(kept),
                len(kept),
            )
            records = records.select(kept)
    if not records:
        raise UserError(
            f"datasets {', '.join(names)} have no image to use"
            + ("; every image is without objects" if filter_empty else "")
        )
    return records


def _as_records(dataset: Sequence[Record] | str, **options: Any) -> Records:
    if isinstance(dataset, str):
        return get_dataset_dicts(names=dataset, **options)
    return dataset if isinstance(dataset, Records) else Records(dataset)


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
    copy_paste: CopyPaste | None = None,
    max_bad_share: float = 0.1,
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
        copy_paste: pastes objects of another image, mapped in the same way, into a sample.
        max_bad_share: samples that cannot be used are logged and replaced; when more than this
            share of the draws were bad, and at least ten, iterating ends. 0 stops at the first.
        start_batch: how many batches of the stream to skip, without reading them.

    Raises:
        UserError: a batch that the processes cannot share, an unknown sampler, copy-paste without
            objects, or a share outside 0 to 1; while iterating, too many bad samples, or a worker
            that died.
    """
    records = _as_records(dataset)
    world_size = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world_size:
        raise UserError(
            f"total batch size {total_batch_size} cannot be shared by {world_size} processes; "
            "change SOLVER.IMS_PER_BATCH / dataloader.train.total_batch_size to a multiple"
        )
    if copy_paste is not None and isinstance(mapper, mappers.SemanticMapper):
        raise UserError(
            "copy-paste needs a mapper with objects; leave out INPUT.COPY_PASTE.ENABLED / "
            "dataloader.train.copy_paste, or use another INPUT.MAPPER / dataloader.train.mapper"
        )
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
    is_wide = records.is_wide() if aspect_ratio_grouping else None
    batches = _BatchSampler(
        _index_sampler(records, sampler, repeat_threshold, seed),
        is_wide,
        total_batch_size // world_size,
        start_batch,
    )
    return _TrainLoader(
        StreamDataset(records, mapper, seed=seed, is_wide=is_wide, copy_paste=copy_paste),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=workers.pack,
        bad_samples=BadSamples(max_share=max_bad_share),
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
    records = _as_records(dataset, filter_empty=False)
    return _Loader(
        MappedDataset(records, mapper),
        batch_size=batch_size,
        sampler=InferenceSampler(len(records)),
        num_workers=num_workers,
        collate_fn=workers.pack,
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
        copy_paste=build_copy_paste(cfg),
        max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
        start_batch=start_batch,
    )


def test_from_cfg(
    cfg: CfgNode,
    name: str,
    *,
    resize: bool = True,  # noqa: PT028 (no test)
) -> torchdata.DataLoader:
    """Build the loader of the test set ``name`` of a yacs config.

    Args:
        resize: to the config's test size; without, images keep their own.
    """
    return build_test_loader(
        dataset=name,
        mapper=mappers.from_cfg(cfg, is_train=False, resize=resize),
        batch_size=cfg.DATALOADER.TEST_BATCH_SIZE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _index_sampler(records: Records, kind: str, threshold: float, seed: int) -> torchdata.Sampler:
    if kind == "training":
        return TrainingSampler(len(records), seed=seed)
    if kind == "repeat_factor":
        if not records.is_annotated().all():
            raise UserError(
                "the repeat-factor sampler needs a dataset with objects; use 'training'"
            )
        return RepeatFactorTrainingSampler(_repeat_factors(records, threshold), seed=seed)
    raise UserError(f"sampler = {kind!r}, expected 'training' or 'repeat_factor'")


def _repeat_factors(records: Records, threshold: float) -> torch.Tensor:
    """Return how often an image comes per epoch, (N,): as its rarest class asks, sqrt(threshold /
    frequency) but at least once (appendix B.2 of the LVIS paper).
    """
    index, category = records.categories()
    _, category, images = np.unique(category, return_inverse=True, return_counts=True)
    repeats = np.maximum(1.0, np.sqrt(threshold * len(records) / images))
    factors = np.ones(len(records))
    np.maximum.at(factors, index, repeats[category])
    return torch.from_numpy(factors).float()


class _BatchSampler(torchdata.Sampler):
    """Batches of (position in the stream, record index), grouped by aspect ratio if ``is_wide`` is
    given.
    """

    def __init__(
        self,
        sampler: torchdata.Sampler,
        is_wide: np.ndarray | None,
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
            group = groups[self.is_wide is not None and bool(self.is_wide[index])]
            group.append((rank + count * world_size, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class _Loader(torchdata.DataLoader):
    """A DataLoader that raises a worker's SampleError itself: one line, without the worker's
    traceback.
    """

    def __init__(self, *args: Any, num_workers: int, **kwargs: Any):
        # Its workers' seed comes from here and not from the global generator: reading data must not
        # change the numbers that the model draws.
        super().__init__(
            *args,
            num_workers=num_workers,
            multiprocessing_context=_context(num_workers),
            worker_init_fn=workers.start,
            generator=torch.Generator(),
            **kwargs,
        )

    def __iter__(self) -> Iterator[list[Record]]:
        be_strict()
        with workers.clear_deaths():
            batches = self._start()
            try:
                for batch in batches:
                    yield [self._take(found) for found in workers.unpack(batch)]
            finally:
                workers.end(batches)

    def _start(self) -> Iterator:
        context = self.multiprocessing_context
        if context is not None and context.get_start_method() == "fork":
            self.worker_init_fn = arrivals = workers.Arrivals(self.num_workers)
            return arrivals.started(super().__iter__)
        with workers.held_signals():
            return super().__iter__()

    def _take(self, found: Any) -> Record:
        """Return the sample of what the dataset gave, or raise why there is none."""
        if isinstance(found, SampleError):
            raise found
        return found


class _TrainLoader(_Loader):
    """The loader of a :class:`StreamDataset`; ``bad_samples`` counts what had to be replaced."""

    def __init__(self, *args, bad_samples: BadSamples, **kwargs):
        super().__init__(*args, **kwargs)
        self.bad_samples = bad_samples

    def _take(self, found: Draw) -> Record:
        return self.bad_samples.take(found)


def _context(num_workers: int) -> str | None:
    """Fork workers wherever the system can. In spawned processes, like the ranks of a launch,
    and from Python 3.14 on they would start anew: 350 MiB for each and seconds of imports.
    """
    return "fork" if num_workers and sys.platform.startswith("linux") else None
