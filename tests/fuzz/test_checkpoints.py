"""Checkpoint files, their folder, and what a run is resumed from."""

from __future__ import annotations

import builtins
import copy
import functools
import io
import json
import logging
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from d2dense import checkpoint
from d2dense.checkpoint import CheckpointFolder, files
from d2dense.engine.trainer import Trainer
from tests.engine.fakes import FakeExperiment
from tests.fuzz.harness import attempt, fuzz
from tests.fuzz.mutations import damaged_bytes, nasty_values, spoiled


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Call:
    """Pickled, it calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _calls(canary) -> list:
    command = canary.command
    return [
        Call(os.system, command),
        Call(subprocess.getoutput, command),
        Call(builtins.eval, f"__import__('os').system({command!r})"),
        Call(builtins.exec, f"import os; os.system({command!r})"),
        Call(functools.partial, os.system, command),
        Call(functools.reduce, os.system, [command]),
        Call(torch.load, str(canary.path)),
        Call(open, str(canary.path), "w"),
        Call(OrderedDict, [("a", Call(os.system, command))]),
        Call(torch._utils._rebuild_tensor_v2, Call(os.system, command), 0, (1,), (1,), False, {}),
        Call(torch._utils._rebuild_parameter, Call(os.system, command), True, OrderedDict()),
        Call(builtins.print, "loud"),
    ]


def _model() -> nn.Module:
    return nn.Linear(3, 2)


def _bytes(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _content() -> dict:
    return {"model": dict(_model().state_dict()), "iteration": 3, "optimizer": {"state": {}}}


def _zipped(record: bytes, **info) -> bytes:
    """A zip file of torch's layout around a pickle, with entries that lie."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", info.pop("method", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", record)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(info.pop("size", 24)))
    return file.getvalue()


def _samples(canary) -> list[bytes]:
    old = {"_use_new_zipfile_serialization": False}
    contents = [_content(), dict(_model().state_dict()), [1, 2], {}, {"model": {"w": 3}}]
    found = [_bytes(each, **options) for each in contents for options in ({}, old)]
    for call in _calls(canary):
        for place in (
            call,
            {"model": {"w": call}},
            {"model": dict(_model().state_dict()), "x": [call]},
        ):
            found += [_bytes(place), _bytes(place, **old), pickle.dumps(place)]
    found += [pickle.dumps(_content()["iteration"]), _zipped(pickle.dumps({"model": {}}))]
    found += [_zipped(pickle.dumps({"model": {}}), method=zipfile.ZIP_DEFLATED, size=1 << 28)]
    for shape in [(10**6, 10**6), (2**62, 2**3), (-1, 3)]:  # a byte that claims to be terabytes
        huge = torch.zeros(1).expand(1, 1)
        data = bytearray(_bytes({"model": {"weight": huge}}))
        found.append(bytes(data))
        found.append(_bytes({"model": {"weight": shape}}))
    found.append(_bytes({"model": {"weight": torch.zeros(1).expand(10**6, 10**6)}}))
    return found


TOKENS = [
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x80\x02",
    b"cos\nsystem\n",
    b"(",
    b"R",
    b".",
    b"\x8a\xff",
]


def test_files_of_weights(profile, canary, tmp_path):
    samples = _samples(canary)
    whole = st.sampled_from(samples)
    # the whole files hold the calls; damage is for the sound ones
    inputs = whole | damaged_bytes(samples[:4], tokens=TOKENS) | damaged_bytes(samples)
    cases = st.tuples(inputs, st.sampled_from([".pth", ".pkl", ".pt", ""]))
    model = _model()

    def read(case) -> None:
        data, suffix = case
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(data)
        attempt(lambda: checkpoint.read(path))
        attempt(lambda: files.check(path))
        attempt(lambda: checkpoint.load_weights(model, path))
        path.unlink()

    fuzz(profile, cases, read, name="checkpoint files", canary=canary, quick=150, factor=60)


WEIGHTS = [
    torch.zeros(2, 3), torch.zeros(3), torch.zeros(0), torch.tensor(1.0), torch.ones(2, 3).bool(),
    torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.complex64),
    torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3).half(),
    torch.zeros(2, 3, device="meta"), {"a": torch.zeros(1)}, nn.Parameter(torch.zeros(2, 3)),
]  # fmt: skip


def test_contents_of_a_file_of_weights(profile, canary, tmp_path):
    """Files that open, with anything in the place of weights and names."""
    path = tmp_path / "weights.pth"
    names = st.sampled_from(["weight", "bias", "module.weight", "model", "state_dict", "blobs", ""])
    names |= nasty_values().filter(lambda v: isinstance(v, (str, int, float, bool, type(None))))
    values = st.sampled_from(WEIGHTS) | nasty_values()
    inner = st.dictionaries(names, values, max_size=4)
    extra = {"matching_heuristics": st.booleans(), "__author__": st.sampled_from(["Caffe2", 3])}
    wrapped = st.fixed_dictionaries({"model": inner | values}, optional=extra)
    model = _model()

    def read(content) -> None:
        try:
            torch.save(content, path)
        except Exception:  # what cannot be saved is no input
            return
        attempt(lambda: checkpoint.read(path))
        report = attempt(lambda: checkpoint.load_weights(model, path, reinit_misshaped=True))
        if report is not None:
            attempt(report.require_complete)
        attempt(lambda: checkpoint.load_weights(model, path, reinit_misshaped=False))

    fuzz(profile, inner | wrapped | values, read, name="contents of checkpoint files", quick=80)


def test_folders(profile, canary, tmp_path):
    """The tag and the list beside the files, with anything in them."""
    good = _bytes(_content())
    outside = tmp_path / "outside.pth"
    outside.write_bytes(good)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "folder.pth").mkdir()
    names = ["model_0000003.pth", "model_0000007.pth", "model_final.pth"]
    odd = [
        "../outside.pth",
        str(outside),
        "folder.pth",
        ".",
        "..",
        "",
        "/",
        "\x00",
        "x" * 5000,
        "\n",
    ]
    entry = {"name": names[0], "iteration": 3, "size": len(good), "resumable": True}
    valid = {"files": [entry, {**entry, "name": names[1], "iteration": 7}], "earlier": []}
    lists = spoiled(valid, extra=[*names, *odd, entry]).map(lambda t: json.dumps(t).encode())
    lists |= damaged_bytes([json.dumps(valid).encode()]) | st.just(None) | st.just(b"[" * 100_000)
    tags = st.sampled_from([*names, *odd]).map(str.encode) | st.binary(max_size=20) | st.just(None)
    contents = st.sampled_from([good, good[:-9], b"", None])
    cases = st.tuples(lists, tags, st.tuples(contents, contents, contents))

    def read(case) -> None:
        listing, tag, kept = case
        for name, data in {"checkpoints.json": listing, "last_checkpoint": tag}.items():
            (folder / name).unlink(missing_ok=True)
            if data is not None:
                (folder / name).write_bytes(data)
        for name, data in zip(names, kept):
            (folder / name).unlink(missing_ok=True)
            if data is not None:
                (folder / name).write_bytes(data)
        runs = CheckpointFolder(folder, keep=2)
        attempt(runs.has_own)
        last = attempt(runs.last)
        found = attempt(runs.resume)
        for path in (last, found and found[0]):
            if path is not None:
                assert path.parent == folder, f"{path} lies outside of the run's folder"
                assert path.resolve().parent == folder.resolve()
        if found is not None:
            attempt(lambda: runs.adopt(found[0], until=3))
            attempt(lambda: runs.save_periodic(8, {"iteration": 8, **_content()}))
        attempt(runs.start_anew)
        assert outside.read_bytes() == good
        for file in folder.glob("model_0000008.pth"):
            file.unlink()

    fuzz(profile, cases, read, name="checkpoint folders", quick=60, factor=60)


RESUMED = [
    torch.zeros(0), torch.zeros(3), torch.full((2, 4), float("nan")), torch.zeros(5056).byte(),
    torch.zeros(2, 4), torch.zeros(625).long(), torch.full((624,), -1), [3, torch.zeros(625), None],
]  # fmt: skip


@pytest.mark.parametrize("ema", [False, True])
def test_resuming_from_anything(profile, canary, tmp_path, ema):
    """A file that opens but whose parts are missing or of other types."""
    settings = {"max_iter": 4, "checkpoint_period": 2, "ema_enabled": ema, "test_names": ()}
    Trainer(FakeExperiment(tmp_path, **{**settings, "max_iter": 2})).train()
    name = "model_0000001.pth"
    content = checkpoint.read(tmp_path / name)
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()

    def read(tree) -> None:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        try:
            torch.save(tree, folder / name)
        except Exception:  # what cannot be saved is no input
            return
        (folder / "last_checkpoint").write_text(name)

        def resume() -> None:
            Trainer(FakeExperiment(folder, **settings), resume=True).train()

        attempt(resume)

    # a good part of the changes goes to what is used after loading
    parts = ["random", "progress", "hooks", "scheduler", "optimizer", "iteration", "ema", "scaler"]
    parts = [part for part in parts if part in content]

    @st.composite
    def trees(draw):
        if draw(st.booleans()):
            return draw(spoiled(content, extra=RESUMED, most=2))
        part = draw(st.sampled_from(parts))
        changed = draw(spoiled({part: content[part]}, extra=RESUMED, most=2))
        return {**copy.copy({k: v for k, v in content.items() if k != part}), **changed}

    fuzz(
        profile,
        trees(),
        read,
        name=f"resuming{' with averages' if ema else ''}",
        quick=30,
        factor=30,
    )
