"""Dataset records held once per machine, for all its ranks and all their loader workers.

A million records as dicts are gigabytes of Python objects, in every rank; and a forked worker
copies every page of them whose reference counts it touches. :class:`Records` looks like that list,
but each record is pickled once, into one file:

- The file is anonymous memory (``memfd``). It needs no disk, is not limited by the size of
  ``/dev/shm`` (64 MB in a container), and has no name that could outlive the processes: the kernel
  frees it with the last of them, however they end.
- Records are read with ``pread`` rather than mapped, so their bytes count towards no process's
  resident memory. Only the offsets and what samplers ask of all records are mapped, as arrays.
- Other processes, whether forked or spawned, open the same file through ``/proc/<pid>/fd``.
"""

from __future__ import annotations

import bisect
import logging
import mmap
import os
import pickle
import secrets
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.utils import comm

from d2dense.errors import UserError

__all__ = ["Records", "RecordsFile", "once_per_machine"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Layout = dict[str, tuple[str, int, int]]  # column -> dtype, byte offset, length
T = TypeVar("T")

_FDS = "/proc/{pid}/fd/{fd}"
_ALIGN = 8

# The column "objects": what an image is annotated with.
_UNKNOWN, _EMPTY, _USABLE = -1, 0, 1


class RecordsFile:
    """An anonymous file of pickled records and the columns of :data:`Layout`; written once.

    Attributes:
        columns: ``ends`` (N + 1,) int64, the bytes between which each record lies; ``is_wide``
            (N,) bool; ``objects`` (N,) int8, whether there is an object that is no crowd, -1 where
            a record has no ``annotations``; ``pairs`` (P, 2) int64, the different (record,
            category) pairs.
    """

    def __init__(self) -> None:
        self._token = secrets.token_bytes(16)  # tells the file from another one under its number
        self.columns: dict[str, np.ndarray] = {}
        self._own(_anonymous_file())

    def _own(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def write(self, records: Iterable[Record]) -> Layout:
        """Write all ``records``; a child process may do this for its parent.

        Returns:
            What :meth:`map` takes.
        """
        columns = {"ends": array("q"), "is_wide": array("b"), "objects": array("b")}
        pairs, position = array("q"), len(self._token)
        with open(self._fd, "wb", closefd=False) as file:
            file.write(self._token)
            columns["ends"].append(position)
            for number, record in enumerate(records):
                position += file.write(pickle.dumps(record, protocol=-1))
                columns["ends"].append(position)
                columns["is_wide"].append(record.get("width", 0) > record.get("height", 0))
                columns["objects"].append(_objects(record))
                for category in _categories(record):
                    pairs.extend((number, category))
            layout = {}
            for name, values in {**columns, "pairs": pairs}.items():
                position += file.write(bytes(-position % _ALIGN))
                layout[name] = ("i8" if values.typecode == "q" else "i1", position, len(values))
                position += file.write(values.tobytes())
        return layout

    def map(self, layout: Layout) -> None:
        """Map the columns of a written file."""
        content = mmap.mmap(self._fd, self.nbytes, access=mmap.ACCESS_READ)
        self.layout = layout
        self.columns = {
            name: np.frombuffer(content, dtype, count=length, offset=offset)
            for name, (dtype, offset, length) in layout.items()
        }
        self.columns["is_wide"] = self.columns["is_wide"].view(bool)
        self.columns["pairs"] = self.columns["pairs"].reshape(-1, 2)
        self._ends = self.columns["ends"]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, number: int) -> Record:
        """Return a new copy of the record ``number``."""
        start, end = self._ends[number : number + 2].tolist()
        return pickle.loads(os.pread(self._fd, end - start, start))

    @property
    def nbytes(self) -> int:
        return os.fstat(self._fd).st_size

    def __reduce__(self):
        """Pickle the way to the file, which is there as long as a process has it open."""
        place = _FDS.format(pid=os.getpid(), fd=self._fd)
        if os.path.exists(place):
            return _reopen, (place, self._token, self.layout)
        return _recreate, (os.pread(self._fd, self.nbytes, 0), self.layout)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("d2dense-records")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _reopen(place: str, token: bytes, layout: Layout) -> RecordsFile:
    file = RecordsFile.__new__(RecordsFile)
    file._own(os.open(place, os.O_RDONLY | os.O_CLOEXEC))
    file._token = os.pread(file._fd, len(token), 0)
    if file._token != token:
        raise FileNotFoundError(f"the records behind {place} are gone with their process")
    file.map(layout)
    return file


def _recreate(content: bytes, layout: Layout) -> RecordsFile:
    file = RecordsFile()
    with open(file._fd, "wb", closefd=False) as stream:
        stream.write(content)
    file.map(layout)
    return file


def _objects(record: Record) -> int:
    if "annotations" not in record:
        return _UNKNOWN
    usable = any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
    return _USABLE if usable else _EMPTY


def _categories(record: Record) -> set[int]:
    return {int(a["category_id"]) for a in record.get("annotations", ()) if "category_id" in a}


class Records(Sequence):
    """A read-only list of dataset records, one or several files one after the other.

    Every access returns a new copy of the record, so changing one changes nothing here; make a
    ``list`` of them for that. Slices and sums of ``Records`` share the files.
    """

    def __init__(self, records: Iterable[Record] = ()):
        file = RecordsFile()
        file.map(file.write(records))
        self._set([file], None)

    @classmethod
    def of_files(cls, files: Sequence[RecordsFile]) -> Records:
        """Return the records of mapped files, joined."""
        return cls.__new__(cls)._set(list(files), None)

    def _set(self, files: list[RecordsFile], chosen: np.ndarray | None) -> Records:
        self._files = files
        self._starts = np.cumsum([0, *map(len, files)]).tolist()
        self._chosen = chosen  # positions in the joined files; None for all of them
        return self

    def __reduce__(self):
        return _restore, (self._files, self._chosen)

    def __len__(self) -> int:
        return self._starts[-1] if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # negative ones, and IndexError
        number = index if self._chosen is None else int(self._chosen[index])
        which = bisect.bisect_right(self._starts, number) - 1
        return self._files[which].read(number - self._starts[which])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: Iterable[Record]) -> Records:
        other = other if isinstance(other, Records) else Records(other)
        if self._chosen is None and other._chosen is None:
            return Records.of_files(self._files + other._files)
        chosen = [self._positions(), other._positions() + self._starts[-1]]
        joined = Records.of_files(self._files + other._files)
        return joined._set(joined._files, np.concatenate(chosen))

    def __repr__(self) -> str:
        return f"Records({len(self)} records)"

    @property
    def nbytes(self) -> int:
        """Size of the files that the records are in."""
        return sum(file.nbytes for file in self._files)

    def _positions(self) -> np.ndarray:
        return np.arange(self._starts[-1]) if self._chosen is None else self._chosen

    def select(self, indices: np.ndarray) -> Records:
        """Return the records at ``indices`` (M,) int64, each at most once."""
        chosen = indices if self._chosen is None else self._chosen[indices]
        return Records.of_files(self._files)._set(self._files, chosen)

    def _column(self, name: str) -> np.ndarray:
        values = [file.columns[name] for file in self._files]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        return whole if self._chosen is None else whole[self._chosen]

    def is_wide(self) -> np.ndarray:
        """Return (N,) bool, whether each image is wider than high; False where sizes are not
        known.
        """
        return self._column("is_wide")

    def is_annotated(self) -> np.ndarray:
        """Return (N,) bool, whether each record has ``annotations``, empty ones included."""
        return self._column("objects") != _UNKNOWN

    def is_empty(self) -> np.ndarray:
        """Return (N,) bool, whether each record has ``annotations`` of which none is usable (no
        crowd).
        """
        return self._column("objects") == _EMPTY

    def categories(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the different (index, category) pairs, as two arrays (P,)."""
        pairs = [f.columns["pairs"] + [s, 0] for f, s in zip(self._files, self._starts)]
        index, category = np.concatenate(pairs).T
        if self._chosen is None:
            return index, category
        new = np.full(self._starts[-1], -1)
        new[self._chosen] = np.arange(len(self._chosen))
        index = new[index]
        return index[index >= 0], category[index >= 0]


def _restore(files: list[RecordsFile], chosen: np.ndarray | None) -> Records:
    return Records.of_files(files)._set(files, chosen)


def once_per_machine(load: Callable[[], T]) -> T:
    """Return ``load()``, which one process per machine calls; the others open what it pickled.

    All processes of the run must call this together. Which of them share a machine (and a view of
    its processes) is found out here, so any launcher will do.

    Raises:
        UserError: the same in all processes when one of those that load raised it.
        RuntimeError: in the others, when a process that loads failed otherwise.
    """
    if comm.get_world_size() == 1 or not _has_process_group():
        return load()
    rank = comm.get_rank()
    places = comm.all_gather(_place(rank))
    leader = places.index(places[rank])
    value: Any = None
    payload: bytes | None = None
    failure: Exception | None = None
    if rank == leader:
        try:
            value = load()
            payload = pickle.dumps(value)
        except Exception as error:
            failure = error
    outcomes = comm.all_gather((payload, _message(rank, failure)))
    if failure is not None:
        raise failure
    for _, theirs in outcomes:
        if theirs is not None:
            raise theirs
    if rank != leader:
        value = _open(outcomes[leader][0], load)
    comm.all_gather(None)  # the leader keeps its file until everybody has opened it
    return value


def _has_process_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _place(rank: int) -> tuple:
    """Return what the processes that see each other under ``/proc`` have in common."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot, os.readlink("/proc/self/ns/pid"), os.getuid()
    except OSError:
        return (rank,)


def _message(rank: int, failure: Exception | None) -> Exception | None:
    if failure is None or isinstance(failure, UserError):
        return failure
    return RuntimeError(f"process {rank} could not read the data: {failure!r}")


def _open(payload: bytes, load: Callable[[], T]) -> T:
    try:
        return pickle.loads(payload)
    except OSError as error:
        logger.warning("the records of another process cannot be shared (%s); reading again", error)
        return load()
