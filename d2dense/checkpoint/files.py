"""One model file: read without running code from it, write so that no half file is ever seen."""

from __future__ import annotations

import errno
import os
import pickle
import pickletools
import socket
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import detectron2.checkpoint  # noqa: F401  registers detectron2:// addresses with the PathManager
import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from d2dense.errors import UserError

__all__ = ["DamagedError", "check", "clean", "read", "replacing", "write"]

_ALLOW = "set TRAIN.ALLOW_PICKLE or train.allow_pickle if you trust its author"
_ZIP = b"PK\x03\x04"  # what torch.load goes by
_ZIP_FOLDER = 0x10
_HOST = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_") or "host"
_STALE_SECONDS = 24 * 3600


class DamagedError(UserError):
    """A checkpoint that is missing, cut short or altered: an earlier one may be whole."""


def read(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors on the CPU.

    Args:
        path: a local file or an address (``https://``, ``detectron2://``), which is downloaded.
        allow_pickle: also open ``.pkl`` files and files that hold arbitrary objects. They can run
            code, so this is for files from a trusted author only.

    Returns:
        The saved mapping; a file that is a bare state dict becomes ``{"model": state_dict}``.

    Raises:
        DamagedError: missing file, or one that is not what was once written: every file that was
            cut short, and every byte that was altered in a zip file (all but the oldest files).
        UserError: a file that cannot be fetched, may not be read, is refused, or is no checkpoint.
    """
    local = _local(str(path))
    if local.suffix == ".pkl":
        if not allow_pickle:
            raise UserError(f"{path} is a pickle, which can run code when opened; {_ALLOW}")
        content = _read_pickle(local, path)
    else:
        content = _read_torch(local, path, allow_pickle)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds {type(content).__name__}, expected a checkpoint or a state dict"
        )
    content = dict(content)
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(content.get(key), Mapping):
            content["model"] = content.pop(key)
            return content
    if not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in content.values()):
        raise UserError(
            f"{path} holds no weights; found the keys {', '.join(map(repr, list(content)[:20]))}"
        )
    return {"model": content}


def check(path: str | os.PathLike) -> None:
    """Find damage without keeping the content: below a second per GB for zip files.

    Raises:
        DamagedError: as :func:`read` does.
    """
    local = _local(str(path))
    if _is_zip(local, path):
        _check_zip(local, path)
    else:
        read(path)


def _local(path: str) -> Path:
    try:
        local = Path(PathManager.get_local_path(path))
    except Exception as error:  # a handler may raise anything: no network, no such host, ...
        raise UserError(f"checkpoint {path} could not be fetched: {error}") from error
    if not os.path.isfile(local):  # False for texts that can be no path
        raise DamagedError(f"checkpoint {path} does not exist")
    return local


def _damaged(path: object, reason: object) -> DamagedError:
    lines = str(reason).splitlines() or [type(reason).__name__]
    return DamagedError(f"checkpoint {path} is damaged or not a checkpoint ({lines[0]})")


def _is_zip(local: Path, path: object) -> bool:
    try:
        with local.open("rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except PermissionError as error:
        raise UserError(f"checkpoint {path} may not be read; change its permissions") from error
    except OSError as error:
        raise _damaged(path, error.strerror) from error


def _check_zip(local: Path, path: object) -> None:
    """Compare every record with its checksum, which torch.load does not."""
    try:
        with zipfile.ZipFile(local) as archive:
            records = archive.infolist()
            # torch can be told to write no checksums; then all are 0
            altered = archive.testzip() if any(record.CRC for record in records) else None
    except Exception as error:  # altered bytes raise anything: an unknown method, a password, ...
        raise _damaged(path, error) from error
    # one taken for a folder is not read by torch.load, which leaves its tensor uninitialised
    folders = [r.filename for r in records if r.external_attr & _ZIP_FOLDER and not r.is_dir()]
    wrong = folders if altered is None else [altered]
    if wrong:
        raise _damaged(path, f"the record {wrong[0]!r} was altered")


def _read_torch(local: Path, path: object, allow_pickle: bool) -> Any:
    is_zip = _is_zip(local, path)
    if is_zip:
        _check_zip(local, path)
    try:
        # unchecked, the indices of a sparse tensor may lead native code anywhere; and torch warns
        # of pickles that it did not write
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            warnings.simplefilter("ignore")
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch reports both an unknown object and a file that is no checkpoint in this way
        if not is_zip and not _has_whole_pickles(local):
            raise _damaged(path, "no readable content") from error
        if not allow_pickle:
            raise UserError(f"{path} holds more than plain values and tensors; {_ALLOW}") from error
    except Exception as error:  # altered bytes raise anything: KeyError, UnicodeDecodeError, ...
        raise _damaged(path, error) from error
    try:
        return torch.load(local, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the objects inside raise
        raise UserError(f"checkpoint {path} cannot be opened: {error}") from error


def _has_whole_pickles(local: Path) -> bool:
    """Whether a file of the format before zip is sound as far as can be known without opening it:
    magic number, protocol, system, content and storage keys, one pickle each.
    """
    try:
        with local.open("rb") as file:
            for _ in range(5):
                for _ in pickletools.genops(file):
                    pass
    except Exception:  # altered bytes raise anything
        return False
    return True


def _read_pickle(local: Path, path: object) -> Any:
    try:
        with local.open("rb") as file:
            content = pickle.load(file, encoding="latin1")
    except Exception as error:  # whatever the objects inside raise
        raise UserError(f"checkpoint {path} cannot be opened: {error}") from error
    if isinstance(content, Mapping) and "blobs" in content:
        content = content["blobs"]
    if isinstance(content, Mapping) and "model" not in content:
        # Caffe2 names, with optimizer state beside the weights
        weights = {name: value for name, value in content.items() if not name.endswith("_momentum")}
        content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    return content


def _plain(value: Any, key: str) -> Any:
    """Return ``value`` made of dicts, lists, tuples, plain values and tensors only."""
    if isinstance(value, np.generic):  # first: numpy's float64 is a float too
        return value.item()
    if value is None or isinstance(value, (torch.Tensor, str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(each, key) for each in value)
    if isinstance(value, Sequence):
        return [_plain(each, key) for each in value]
    raise TypeError(f"checkpoint entry {key} is a {type(value).__name__}, expected plain values")


def write(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that, whatever happens, ``path`` holds the old file or the new one.

    Raises:
        TypeError: a value that :func:`read` would refuse; containers become plain ones.
        UserError: no space, no permission, ...
    """
    content = _plain(content, "")
    with replacing(path) as file:
        torch.save(content, file)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name ``path`` once it is whole and on the disk.

    Raises:
        UserError: it cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{_HOST}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise UserError(
            f"{path} cannot be written ({cause.strerror or cause}); make room, or set OUTPUT_DIR "
            "or train.output_dir to another folder, or keep fewer checkpoints with "
            "SOLVER.CHECKPOINT_KEEP or train.checkpointer.max_to_keep"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the first OSError behind ``error``; torch.save hides it behind an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk: without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def clean(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of :func:`replacing` for names that match ``pattern``.

    A file stays while the process that writes it may live: another run may be saving here. A
    process on another machine cannot be asked, so its files stay for a day; so do those whose
    number a new process has.
    """
    for file in folder.glob(f".{pattern}.tmp-*-*"):
        host, _, pid = file.name.rpartition(".tmp-")[2].rpartition("-")
        if not pid.isdigit():
            continue
        with suppress(OSError):  # another process may have removed it, or owns it
            gone = host == _HOST and (int(pid) == os.getpid() or not _is_alive(int(pid)))
            if gone or time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to somebody else, or is no number of a process
        return True
    return True
