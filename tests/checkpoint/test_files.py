"""One model file: damage is found, what is refused stays refused, a failed write is harmless."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from d2dense import checkpoint
from d2dense.checkpoint import DamagedError, files
from d2dense.errors import UserError

CONTENT = {
    "model": {"body": torch.arange(12.0).reshape(3, 4), "head": torch.zeros(3)},
    "iteration": 3,
    "hooks": {"best": "text"},
}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Trap:
    """Running code when opened, as a pickle may."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def saved(path, content=CONTENT, *, zipped=True) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@FORMATS
def test_every_truncation_is_damage(tmp_path, zipped):
    path = tmp_path / "a.pth"
    data = saved(path, zipped=zipped)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedError, match=r"a\.pth is damaged"):
            checkpoint.read(path)
        with pytest.raises(DamagedError):
            files.check(path)
    path.write_bytes(data)
    files.check(path)
    assert torch.equal(checkpoint.read(path)["model"]["body"], CONTENT["model"]["body"])


def flipped_bits(data):
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << (place % 8)
        yield place, altered


def zeroed_blocks(data, size=64):
    """What a power cut leaves of a file whose pages did not all reach the disk."""
    for place in range(0, len(data), size):
        altered = bytearray(data)
        altered[place : place + size] = bytes(len(altered[place : place + size]))
        yield place, altered


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("changes", [flipped_bits, zeroed_blocks])
def test_altered_bytes_are_damage_or_mean_nothing(tmp_path, changes):
    path = tmp_path / "a.pth"
    data = saved(path)
    whole = repr(checkpoint.read(path))
    damaged = total = 0
    for place, altered in changes(data):
        path.write_bytes(altered)
        total += 1
        try:
            content = checkpoint.read(path)
        except DamagedError:
            damaged += 1
        else:  # padding, dates and the like
            assert repr(content) == whole, place
    assert damaged > total / 3


def test_a_record_taken_for_a_folder_is_damage(tmp_path):
    """One bit of a zip's directory, for which torch.load gives a tensor of whatever memory held."""
    path = tmp_path / "a.pth"
    data = saved(path)
    for start in (match.start() for match in re.finditer(rb"PK\x01\x02", data)):
        altered = bytearray(data)
        altered[start + 38] |= 0x10  # the external attributes
        path.write_bytes(altered)
        with pytest.raises(DamagedError, match="was altered"):
            checkpoint.read(path)


def test_an_altered_record_without_a_name_is_damage(tmp_path):
    path = tmp_path / "a.pth"
    data = saved(path)
    assert data.count(b"a/byteorder") == 2
    path.write_bytes(data.replace(b"a/byteorder", b"\0/byteorder").replace(b"little", b"litter"))
    with pytest.raises(DamagedError, match="the record '' was altered"):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_altered_bytes_of_the_old_format_are_no_traceback(tmp_path):
    """It has no checksums, so not all can be found."""
    path = tmp_path / "a.pth"
    data = saved(path, zipped=False)
    for _, altered in flipped_bits(data):
        path.write_bytes(altered)
        with suppress(UserError):
            checkpoint.read(path)


def test_weights_without_checksums_are_not_held_to_them(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read(tmp_path / "a.pth")["iteration"] == 3


@FORMATS
def test_code_in_a_file_is_refused_and_not_called_damage(tmp_path, zipped):
    path, mark = tmp_path / "a.pth", tmp_path / "ran"
    data = saved(path, {**CONTENT, "extra": Trap(mark)}, zipped=zipped)
    with pytest.raises(UserError, match="allow_pickle") as refused:
        checkpoint.read(path)
    assert not isinstance(refused.value, DamagedError)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            checkpoint.read(path)
    assert not mark.exists()


def test_a_folder_or_a_missing_file_is_damage(tmp_path):
    (tmp_path / "a.pth").mkdir()
    for name in ("a.pth", "b.pth"):
        with pytest.raises(DamagedError, match="does not exist"):
            checkpoint.read(tmp_path / name)


@contextmanager
def limited_file_size(size):
    """Let every write beyond ``size`` bytes of a file fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, limit):
    path = tmp_path / "a.pth"
    checkpoint.write(path, CONTENT)
    before = path.read_bytes()
    with (
        limited_file_size(limit),
        pytest.raises(UserError, match=r"a\.pth cannot be written \(File too large\); make room"),
    ):
        checkpoint.write(path, {"model": {"w": torch.zeros(1_000_000)}})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_later_is_one_line_too(tmp_path, monkeypatch, step):
    path = tmp_path / "a.pth"
    checkpoint.write(path, CONTENT)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"):
        checkpoint.write(path, {"model": {"w": torch.zeros(1)}})
    assert set(checkpoint.read(path)["model"]) == set(CONTENT["model"])


def test_errors_that_are_not_the_disk_s_keep_their_kind(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="device-side"):
        checkpoint.write(tmp_path / "a.pth", CONTENT)
    assert not any(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = files._HOST
    leftovers = [f".a.pth.tmp-{host}-{gone.pid}", f".b.pth.tmp-{host}-{os.getpid()}"]
    old = [f".a.pth.tmp-{host}-{os.getppid()}", ".a.pth.tmp-another-1"]
    kept = [
        f".b.pth.tmp-{host}-{os.getppid()}",  # its process lives
        ".b.pth.tmp-another-1",  # a process that cannot be asked
        f".a.txt.tmp-{host}-{gone.pid}",
        f"a.pth.tmp-{host}-{gone.pid}",
        ".a.pth.swp",
        ".a.pth.tmp-notes-of-mine",
        "a.pth",
    ]
    for name in [*leftovers, *old, *kept]:
        (tmp_path / name).write_bytes(b"half")
    for name in old:
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    files.clean(tmp_path, "*.pth")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({}, "holds no weights"),
        ({3: torch.zeros(2)}, "a weight is named 3"),
        ({"weight": torch.zeros(2, 3).to_sparse()}, "without plain values"),
        ({"weight": torch.zeros(2, 3, device="meta")}, "without plain values"),
        ({"weight": torch.zeros(2, 3) * 1j}, "weight has complex values, expected torch.float32"),
    ],
)
def test_weights_that_are_none_are_one_line(tmp_path, recwarn, model, reason):
    torch.save({"model": model}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=reason):
        checkpoint.load_weights(torch.nn.Linear(3, 2), tmp_path / "a.pth")
    assert not recwarn.list


def test_indices_that_lead_out_of_a_sparse_tensor_are_damage(tmp_path):
    """Native code follows them without a look."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        wrong = torch.sparse_coo_tensor(torch.tensor([[10**9]]), torch.tensor([1.0]), (2,))
    torch.save({"model": {"weight": wrong}}, tmp_path / "a.pth")
    with pytest.raises(DamagedError):
        checkpoint.read(tmp_path / "a.pth")


def test_a_refused_pickle_is_one_line_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"model": Trap(tmp_path / "ran")}, protocol=4))
    with pytest.raises(UserError):
        checkpoint.read(path)
    assert not recwarn.list
    assert not (tmp_path / "ran").exists()
