"""The checkpoints of one run: names, the tag of the last one, how many stay, and which to resume.

Beside the files lie ``last_checkpoint``, Detectron2's tag with the name of the newest one, and
``checkpoints.json``, the list of what the present run has saved. Everything is read from the disk
when it is needed, so that a process which takes over from a killed one knows the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from d2dense.errors import UserError

from . import files
from .files import DamagedError

__all__ = ["CheckpointFolder"]

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
_LIST = "checkpoints.json"
# What a folder can hold: no path, and no text that is not one for the system.
_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,200}\.pth")
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One saved file; ``resumable`` ends when the run goes on from an earlier one."""

    name: str
    iteration: int | None
    size: int
    resumable: bool = True

    @property
    def is_periodic(self) -> bool:
        return _PERIODIC.fullmatch(self.name) is not None


@dataclass(kw_only=True)
class _Listing:
    """What ``checkpoints.json`` holds.

    Attributes:
        files: of the present run, in the order of saving.
        earlier: of the run before it in this folder, as long as the tag names one of these.
    """

    files: list[_Entry] = field(default_factory=list)
    earlier: list[_Entry] = field(default_factory=list)

    def own(self) -> list[_Entry]:
        return [entry for entry in self.files if entry.resumable]


class CheckpointFolder:
    """Write ``model_0000099.pth``, ``model_final.pth``, ... so that a run can always go on.

    Every step of a save leaves a folder that :meth:`resume` understands: first the file itself,
    whole and flushed, then the list, then the tag, and only then old files are removed.

    One process writes; :meth:`has_own`, :meth:`resume` and :meth:`last` only read.

    Args:
        path: the folder; created when the first file is written.
        keep: how many of this run's periodic files stay, 0 for all. Two or more leave something
            to fall back to when the newest is damaged on the disk.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 0):
        self.path = Path(path)
        self.keep = keep

    def start_anew(self) -> None:
        """Begin a run that does not go on from what the folder holds.

        Files of earlier runs stay; they are never removed, nor resumed in place of this run's. Up
        to this run's first save, :meth:`resume` still continues the earlier run.
        """
        self._clean()
        listing = self._read_list()
        earlier = listing.own() or listing.earlier or self._found()
        earlier = [entry for entry in earlier if (self.path / entry.name).is_file()]
        if not earlier:
            if listing.files:
                self._write_list(_Listing())
            return
        logger.warning(
            "%s has checkpoints of an earlier run, the last one %s, which --resume would have "
            "continued; this run starts anew and overwrites files of the same name",
            self.path,
            self._tagged() or earlier[-1].name,
        )
        self._write_list(_Listing(earlier=earlier))

    def save(self, name: str, content: Mapping[str, Any], *, tag: bool = True) -> Path:
        """Write ``<name>.pth``; with ``tag`` it becomes the one that :meth:`last` returns.

        Raises:
            UserError: it cannot be written; what was there before is as it was.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder {self.path} cannot be made ({error.strerror}); set OUTPUT_DIR or "
                "train.output_dir"
            ) from error
        file = self.path / f"{name}.pth"
        files.write(file, content)
        entry = self._entry(file.name, content.get("iteration"), resumable=tag)
        listing = self._read_list()
        listing.files = [each for each in listing.files if each.name != file.name] + [entry]
        self._write_list(listing)
        if tag:
            self._write_tag(file.name)
            if listing.earlier:
                listing.earlier = []
                self._write_list(listing)
        return file

    def save_periodic(self, iteration: int, content: Mapping[str, Any]) -> Path:
        """Write the file of ``iteration`` (counted from 0) and remove those beyond ``keep``."""
        file = self.save(f"model_{iteration:07d}", content)
        if self.keep > 0:
            self._remove_old(until=iteration)
        return file

    def has_own(self) -> bool:
        """Whether the present run (since :meth:`start_anew`) has a checkpoint to go on from."""
        return bool(self._read_list().own())

    def resume(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its content, None where there is none at all.

        Raises:
            UserError: all are damaged, or the newest whole one is refused.
        """
        return self._first_whole(files.read)

    def last(self) -> Path | None:
        """Return the file that :meth:`resume` would read, or None where there is none."""
        found = self._first_whole(files.check)
        return found[0] if found else None

    def adopt(self, path: Path, *, until: int) -> None:
        """Go on from ``path``, which :meth:`resume` gave: its run is the present one.

        Files saved after it are of a past that will be repeated: they are not resumed any more,
        and are overwritten or (with ``keep``) removed as the run passes them.

        Args:
            path: the file that was resumed.
            until: its iteration.
        """
        self._clean()
        listing = self._read_list()
        entries = listing.files if listing.own() else listing.earlier or self._found()
        names = [entry.name for entry in entries]
        place = names.index(path.name) if path.name in names else len(names)
        files_now = [
            replace(entry, resumable=False)
            if index > place or (entry.iteration is not None and entry.iteration > until)
            else entry
            for index, entry in enumerate(entries)
        ]
        files_now[place : place + 1] = [self._entry(path.name, until)]
        # the tag first: with the list as it was, it never leads to a file of an earlier run
        self._write_tag(path.name)
        self._write_list(_Listing(files=files_now))

    def _first_whole(self, read: Callable[[Path], Any]) -> tuple[Path, Any] | None:
        """Return the first candidate that ``read`` does not find damaged, and what it returns."""
        damaged: list[str] = []
        for name in self._candidates():
            path = self.path / name
            try:
                content = read(path)
            except DamagedError as error:
                damaged.append(str(error))
                continue
            for reason in damaged:
                logger.warning("%s; going back to %s", reason, name)
            return path, content
        if damaged:
            raise UserError(
                f"no checkpoint in {self.path} is whole: {'; '.join(damaged)}; "
                "leave out --resume to start anew"
            )
        return None

    def _candidates(self) -> list[str]:
        """Return names to resume from, best first."""
        listing = self._read_list()
        own = listing.own()
        tag = self._tagged()
        if own and listing.earlier:
            tag = None  # killed before the tag moved on from the earlier run
        entries = own or [e for e in listing.earlier if e.resumable] or self._found()
        names = [entry.name for entry in entries]
        if tag is None:
            any_left = any((self.path / name).is_file() for name in names)
            return names[::-1] if any_left else []
        place = names.index(tag) if tag in names else len(names)
        # the newer ones last: the tag is ahead of them where a user has put it back
        return [tag, *names[:place][::-1], *names[place + 1 :]]

    def _found(self) -> list[_Entry]:
        """Return what the folder of a run without a list (Detectron2's) holds, oldest first."""
        tag = self._tagged()
        if tag is None:
            return []
        match = _PERIODIC.fullmatch(tag)
        limit = int(match[1]) if match else None
        found = {}
        for file in self.path.glob("model_*.pth"):
            match = _PERIODIC.fullmatch(file.name)
            if match and file.name != tag and (limit is None or int(match[1]) < limit):
                found[int(match[1])] = file.name
        entries = [self._entry(found[iteration], iteration) for iteration in sorted(found)]
        return [*entries, self._entry(tag, limit)]

    def _remove_old(self, *, until: int) -> None:
        """Remove periodic files beyond ``keep``, and those up to iteration ``until`` that the run
        has gone back before. The newest, which the tag names, always stays.
        """
        listing = self._read_list()
        periodic = [entry for entry in listing.files if entry.is_periodic]
        # one that is missing or cut short is no fallback, so it does not count
        whole = [entry for entry in periodic if entry.resumable and self._is_whole(entry)]
        oldest = periodic.index(whole[-self.keep]) if len(whole) > self.keep else 0
        removed = set()
        for index, entry in enumerate(periodic):
            is_passed = not entry.resumable and (entry.iteration or 0) <= until
            if not (index < oldest or is_passed):
                continue
            try:
                (self.path / entry.name).unlink(missing_ok=True)
                removed.add(entry.name)
            except OSError as error:  # the new file is in place: no reason to end the run
                logger.warning("%s stays: %s", self.path / entry.name, error.strerror)
        if removed:
            listing.files = [entry for entry in listing.files if entry.name not in removed]
            self._write_list(listing)

    def _entry(self, name: str, iteration: Any, *, resumable: bool = True) -> _Entry:
        iteration = iteration if isinstance(iteration, int) else None
        size = self._size(name)
        return _Entry(name=name, iteration=iteration, size=size, resumable=resumable)

    def _is_whole(self, entry: _Entry) -> bool:
        return self._size(entry.name) == entry.size > 0

    def _size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return 0

    def _tagged(self) -> str | None:
        """Return the name in the tag; one that leads out of the folder counts as none."""
        name = (self._read_text(_TAG) or "").strip()
        if not name or _NAME.fullmatch(name):
            return name or None
        logger.warning("%s names %.80r, which is no checkpoint here", self.path / _TAG, name)
        return None

    def _read_text(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror})") from error

    def _write_tag(self, name: str) -> None:
        with files.replacing(self.path / _TAG) as file:
            file.write(name.encode())

    def _read_list(self) -> _Listing:
        text = self._read_text(_LIST)
        if text is None:
            return _Listing()
        try:
            content = json.loads(text)
            return _Listing(files=_entries(content["files"]), earlier=_entries(content["earlier"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning(
                "%s is damaged (%s: %s); going by the files' names",
                self.path / _LIST,
                type(error).__name__,
                error,
            )
            return _Listing(files=self._found())

    def _write_list(self, listing: _Listing) -> None:
        content = {
            "files": [asdict(entry) for entry in listing.files],
            "earlier": [asdict(entry) for entry in listing.earlier],
        }
        with files.replacing(self.path / _LIST) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _clean(self) -> None:
        for pattern in ("*.pth", _TAG, _LIST):
            files.clean(self.path, pattern)


def _entries(items: list[dict]) -> list[_Entry]:
    """Return the entries of a list read from the disk; ValueError, KeyError or TypeError unless
    all are sound. A name never leads out of the folder.
    """
    entries = [_Entry(**item) for item in items]
    for entry in entries:
        sound = (
            _NAME.fullmatch(entry.name)
            and isinstance(entry.iteration, int | None)
            and isinstance(entry.size, int)
            and isinstance(entry.resumable, bool)
        )
        if not sound:
            raise ValueError(f"odd entry {entry}")
    return entries
