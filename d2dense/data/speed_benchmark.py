"""How fast training samples are made: images per second by augmentation recipe and workers, and
where the time goes.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest import mock

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from d2dense.benchmark import interleaved, ratios

from . import augmentations, mappers
from .copy_paste import CopyPaste
from .loaders import build_train_loader
from .records import Records, RecordsFile

__all__ = [
    "PASTES",
    "RECIPES",
    "build_mapper",
    "compare_with_detectron2",
    "cost_of_pasting",
    "shares",
    "throughput",
]

RECIPES = ("default", "detr", "lsj", "lsj, copy-paste", "lsj, corrected copy-paste", "semantic")
PASTES = {
    "lsj, copy-paste": CopyPaste(),
    "lsj, corrected copy-paste": CopyPaste(corrected=True),
}
_MIN_SIZES = (640, 672, 704, 736, 768, 800)
_BATCH = 4


def build_mapper(recipe: str) -> mappers.DetectionMapper | mappers.SemanticMapper:
    """Return the training mapper of a recipe at its usual sizes, with instance masks as polygons
    where it is for detection.
    """
    recipes: dict[str, Callable[..., list]] = {
        "default": functools.partial(augmentations.default, min_size=_MIN_SIZES),
        "detr": augmentations.detr,
        "lsj": augmentations.lsj,
        "semantic": augmentations.semantic,
    }
    steps = recipes[recipe.partition(",")[0]](is_train=True)
    if recipe == "semantic":
        return mappers.SemanticMapper(is_train=True, augmentations=steps)
    return mappers.DetectionMapper(
        is_train=True,
        augmentations=steps,
        use_instance_mask=True,
        recompute_boxes=recipe != "default",
    )


def _stream(records: Records, recipe: str, mapper: Callable, workers: int) -> Iterator[list[dict]]:
    loader = build_train_loader(
        dataset=records,
        mapper=mapper,
        copy_paste=PASTES.get(recipe),
        total_batch_size=_BATCH,
        num_workers=workers,
        seed=0,
    )
    return iter(loader)


def throughput(
    records: Records, recipe: str, *, workers: Sequence[int], images: int, rounds: int = 3
) -> dict[int, float]:
    """Return images per second for each number of workers, the start of the workers included.

    The numbers of workers take turns; each figure is the median of ``rounds`` turns.
    """
    mapper, batches = build_mapper(recipe), max(1, images // _BATCH)

    def draw(count: int) -> None:
        stream = _stream(records, recipe, mapper, count)
        for _ in range(batches):
            next(stream)

    turns = {str(count): functools.partial(draw, count) for count in workers}
    times = interleaved(turns, rounds=rounds)
    return {w: batches * _BATCH / statistics.median(times[str(w)]) for w in workers}


def cost_of_pasting(records: Records, *, images: int, rounds: int = 5) -> dict[str, float]:
    """Return the time per sample of each kind of copy-paste, by recipe, as a multiple of that of
    the same recipe without; they take turns, in this process.
    """
    batches = max(1, images // _BATCH)

    def draw(recipe: str) -> None:
        stream = _stream(records, recipe, build_mapper(recipe), 0)
        for _ in range(batches):
            next(stream)

    turns = {recipe: functools.partial(draw, recipe) for recipe in ("lsj", *PASTES)}
    found = ratios(interleaved(turns, rounds=rounds), "lsj")
    return {recipe: found[recipe] for recipe in PASTES}


def shares(records: Records, recipe: str, *, images: int) -> dict[str, float]:
    """Return the milliseconds per image of each step, measured without workers.

    With copy-paste the steps of the second image are included. ``transfer`` is what a worker does
    on top: it copies the sample into memory that the training
    process has too. ``rest`` is everything between the steps, such as the random state that every
    sample has of its own.
    """
    clock, mapper = _Clock(), build_mapper(recipe)
    steps = mapper.augmentations.augs
    mapper.augmentations.augs = [_Timed(step, clock) for step in steps]
    timed = {
        (RecordsFile, "read"): "record",
        (mappers, "read_image"): "decode",
        (mappers, "read_sem_seg"): "decode label map",
        (mappers, "to_tensor"): "image to tensor",
        (mappers.DetectionMapper, "_masks"): "masks",
        (mappers.DetectionMapper, "_pack"): "boxes and packing",
        (CopyPaste, "__call__"): "copy-paste",
    }
    with contextlib.ExitStack() as patches:
        for (owner, name), title in timed.items():
            function = clock.around(title, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, function))
        stream = _stream(records, recipe, mapper, 0)
        next(stream)
        clock.seconds.clear()
        batches = max(1, images // _BATCH)
        for _ in range(batches):
            with clock("whole"):
                batch = next(stream)
            with clock("transfer"):
                ForkingPickler.dumps(batch)
    whole = clock.seconds.pop("whole")
    clock.seconds["rest"] = whole - sum(clock.seconds.values()) + clock.seconds["transfer"]
    return {name: 1000 * t / batches / _BATCH for name, t in clock.seconds.items()}


class _Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        return timed


class _Timed(T.Augmentation):
    """An augmentation under a clock."""

    def __init__(self, step: T.Augmentation, clock: _Clock):
        super().__init__()
        self.step = step
        self.clock = clock

    def __call__(self, inputs: T.AugInput) -> T.Transform:
        with self.clock(type(self.step).__name__):
            return self.step(inputs)


def compare_with_detectron2(records: Records, *, images: int, rounds: int = 5) -> float:
    """Return the time of the recipe ``default`` as a multiple of that of Detectron2's mapper on the
    same images, both resizing to the same sizes.
    """
    chosen = list(records[:images])
    theirs = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(_MIN_SIZES, 1333, "choice"), T.RandomFlip()],
        image_format="BGR",
        use_instance_mask=True,
    )

    def run(mapper: Callable[[dict[str, Any]], Any]) -> None:
        np.random.seed(0)
        for record in chosen:
            mapper(record)

    turns = {
        "ours": functools.partial(run, build_mapper("default")),
        "theirs": functools.partial(run, theirs),
    }
    return ratios(interleaved(turns, rounds=rounds), "theirs")["ours"]
