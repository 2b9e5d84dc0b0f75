"""From an index to a mapped sample, and what happens where there is none.

A sample cannot be used when its mapper raises a :class:`~d2dense.data.reading.SampleError`: the
picture or label map is missing, truncated, no picture, of floats, or of another size than
annotated; a mask does not fit. In evaluation that is an error. In training, where one damaged file
among a million must not end a run of days:

- The sample is replaced by another one, chosen and augmented by (seed, position in the stream,
  attempt) alone: the same for any number of workers and after resuming, and from the images of the
  same orientation, so that batches stay as they are.
- The training process logs each such file once, with the reason.
- It counts, and ends the run when more than ``max_bad_share`` of the draws so far were bad.

A :class:`~d2dense.data.reading.RejectedSample` is replaced in the same way, but is not bad: nothing
is logged or counted.

Any other exception in a mapper is a programming mistake. It ends the run, and names the file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import data as torchdata

from d2dense.errors import UserError

from .copy_paste import CopyPaste
from .reading import RejectedSample, SampleError

__all__ = ["BadSamples", "Draw", "MappedDataset", "StreamDataset"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Draws per position; the second half may be of the other orientation, in case that all images of
# this one are bad.
_ATTEMPTS = 32
# With fewer bad draws than this their share says nothing yet.
_MIN_BAD = 10
_LAST = 3
_KEYS = "DATALOADER.MAX_BAD_SHARE / dataloader.train.max_bad_share"


@dataclass(frozen=True)
class Draw:
    """What one position of the training stream gave.

    Attributes:
        sample: None where no attempt gave one.
        errors: of the attempts that failed, in order.
        read: how many samples were made for it, those that failed left out.
    """

    sample: Record | None
    errors: tuple[SampleError, ...] = ()
    read: int = 1


class _Mapped(torchdata.Dataset):
    """Records and the mapper that makes samples of them."""

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Record]):
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Record | SampleError:
        """Return the sample of a record, or why it cannot be used."""
        record = self.records[index]
        try:
            return self.mapper(record)
        except SampleError as error:
            return error
        except Exception as error:
            raise RuntimeError(
                f"mapping {record.get('file_name', f'record {index}')} failed with "
                f"{type(error).__name__}: {error}"
            ) from error


class MappedDataset(_Mapped):
    """Records through a mapper; a sample that cannot be used is returned as its error, which the
    training process raises without the traceback of a worker.
    """

    def __getitem__(self, index: int) -> Record | SampleError:
        return self.sample(index)


class StreamDataset(_Mapped):
    """Maps (position, index) with all random numbers fixed by (seed, position), and replaces
    samples that cannot be used.

    Args:
        records: in Detectron2's dataset format.
        mapper: from a record to what a model is fed.
        seed: of all random numbers.
        is_wide: (N,) bool, the group that each record's replacement comes from; None for one group.
        copy_paste: pastes objects of a second record, drawn from all others, where there is one.
    """

    def __init__(
        self,
        records: Sequence[Record],
        mapper: Callable[[Record], Record],
        *,
        seed: int,
        is_wide: np.ndarray | None = None,
        copy_paste: CopyPaste | None = None,
    ):
        super().__init__(records, mapper)
        self.seed = seed
        self.is_wide = is_wide
        self.copy_paste = copy_paste

    def __getitem__(self, item: tuple[int, int]) -> Draw:
        position, index = item
        errors: list[SampleError] = []
        for attempt in range(_ATTEMPTS):
            with _seeded(self.seed, position, attempt):
                other = self._replacement(index, attempt) if attempt else index
                found = self.sample(other)
                if not isinstance(found, SampleError):
                    return self._finish(found, other, errors)
            if not isinstance(found, RejectedSample):
                errors.append(found)
            rejected = found
        return Draw(None, tuple(errors) or (rejected,), read=0)

    def _finish(self, target: Record, index: int, errors: list[SampleError]) -> Draw:
        """Paste objects of another record into the sample ``target`` of record ``index``.

        A second record that cannot be used is replaced like a first one. If it is rejected, or if
        there is no other, the target stays as it is.
        """
        if self.copy_paste is None or len(self) < 2 or not self.copy_paste.is_due(target):
            return Draw(target, tuple(errors))
        for _ in range(_ATTEMPTS):
            other = int(np.random.randint(len(self) - 1))
            source = self.sample(other + (other >= index))
            if isinstance(source, RejectedSample):
                return Draw(target, tuple(errors))
            if not isinstance(source, SampleError):
                return Draw(self.copy_paste(target, source), tuple(errors), read=2)
            errors.append(source)
        return Draw(target, tuple(errors))

    def _replacement(self, index: int, attempt: int) -> int:
        """Draw a record in place of ``index``."""
        if self.is_wide is None or attempt >= _ATTEMPTS // 2:
            return int(np.random.randint(len(self)))
        group = self._wide if self.is_wide[index] else self._tall
        return int(group[np.random.randint(len(group))])

    @functools.cached_property  # not made before a sample is bad: 8 bytes per record
    def _wide(self) -> np.ndarray:
        return np.flatnonzero(np.asarray(self.is_wide))

    @functools.cached_property
    def _tall(self) -> np.ndarray:
        return np.flatnonzero(~np.asarray(self.is_wide))


@contextlib.contextmanager
def _seeded(*words: int) -> Iterator[None]:
    """Fix the global generators that augmentations draw from, and put them back afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(words).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reseed CUDA too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class BadSamples:
    """Logs and counts the samples that could not be used, in the training process.

    Args:
        max_share: the run ends when more than this share of the draws so far were bad and at least
            ten were, so that one bad file among the first few is survived. 0 ends it at the first.

    Attributes:
        drawn, bad: how many samples were read, replacements included, and how many of them could
            not be used.
    """

    def __init__(self, *, max_share: float):
        if not 0 <= max_share <= 1:
            raise UserError(f"{_KEYS} = {max_share}, expected a share from 0 to 1")
        self.max_share = max_share
        self.drawn = 0
        self.bad = 0
        self._logged: set[str] = set()
        self._last: deque[SampleError] = deque(maxlen=_LAST)

    def take(self, draw: Draw) -> Record:
        """Return the sample of ``draw``, after noting what went wrong before.

        Raises:
            SampleError: too many were bad, or no attempt gave a sample.
        """
        self.drawn += len(draw.errors) + draw.read
        self.bad += len(draw.errors)
        for error in draw.errors:
            self._note(error)
        enough = self.bad >= _MIN_BAD or self.max_share == 0
        if draw.sample is None or (enough and self.bad > self.max_share * self.drawn):
            raise SampleError(self._stop_message(), self._last[-1].file_name)
        return draw.sample

    def _note(self, error: SampleError) -> None:
        self._last.append(error)
        if error.file_name not in self._logged:
            self._logged.add(error.file_name)
            logger.warning("%s; another image is used in its place", error)

    def _stop_message(self) -> str:
        names = list(dict.fromkeys(error.file_name for error in self._last))
        return (
            f"{self.bad} of the {self.drawn} samples drawn so far ({self.bad / self.drawn:.1%}) "
            f"cannot be used; {_KEYS} allows {self.max_share:.1%}. The last files: "
            f"{', '.join(names)}; the last reason: {self._last[-1]}. Correct the files "
            "(tools/check_dataset.py lists them all), or allow a larger share"
        )
