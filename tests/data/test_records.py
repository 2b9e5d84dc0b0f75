"""Records look like a list, are one file for all processes, and leave nothing behind."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import RepeatFactorTrainingSampler

from d2dense.data import coco_format, datasets, loaders
from d2dense.data.child import call_in_child
from d2dense.data.classes import dataset_classes
from d2dense.data.records import Records, RecordsFile
from d2dense.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def make_records(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "file_name": f"{i}.jpg",
            "image_id": i,
            "width": int(rng.integers(1, 5)),
            "height": int(rng.integers(1, 5)),
            "annotations": [
                {"category_id": int(rng.geometric(0.3)), "iscrowd": int(rng.random() < 0.3)}
                for _ in range(rng.integers(4))
            ],
        }
        for i in range(count)
    ]


def test_records_are_read_like_a_list():
    plain = make_records(23)
    records = Records(plain)
    assert list(records) == plain
    assert len(records) == 23
    assert records[np.int64(4)] == plain[4]
    assert records[-1] == plain[-1]
    assert list(reversed(records)) == plain[::-1]
    assert plain[3] in records
    for index in (23, -24):
        with pytest.raises(IndexError):
            records[index]
    for part in (slice(4), slice(-3, None), slice(20, 2, -5), slice(5, 5)):
        assert list(records[part]) == plain[part]
        assert list(records[part][1:]) == plain[part][1:]
    assert not Records()
    assert bool(records)


def test_a_record_is_a_copy():
    records = Records([{"annotations": [{"bbox": [1, 2]}]}])
    records[0]["annotations"][0]["bbox"].append(3)
    assert records[0] == {"annotations": [{"bbox": [1, 2]}]}


def test_records_are_joined_in_order():
    a, b = make_records(5), make_records(7, seed=1)
    both = Records(a) + Records(b)
    assert list(both) == a + b
    assert list(both[3:9] + both[:2] + b) == (a + b)[3:9] + a[:2] + b
    assert list(Records(a) + Records(a)) == a + a


def test_columns_follow_choices_and_sums():
    a, b = make_records(40), make_records(30, seed=1)
    del b[3]["annotations"], b[4]["width"]
    plain = (a + b)[50:10:-3] + b[:6]
    records = (Records(a) + Records(b))[50:10:-3] + Records(b)[:6]
    assert list(records) == plain
    assert records.is_wide().tolist() == [r.get("width", 0) > r["height"] for r in plain]
    assert records.is_annotated().tolist() == ["annotations" in r for r in plain]
    assert records.is_empty().tolist() == [
        "annotations" in r and all(o["iscrowd"] for o in r["annotations"]) for r in plain
    ]
    pairs = set(zip(*(column.tolist() for column in records.categories())))
    objects = ((i, o) for i, r in enumerate(plain) for o in r.get("annotations", ()))
    assert pairs == {(i, o["category_id"]) for i, o in objects}


@pytest.mark.parametrize("threshold", [0.001, 0.2, 0.9])
def test_repeat_factors_are_detectron2s(threshold):
    plain = make_records(200)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(plain, threshold)
    assert (expected > 1).any() or threshold < 0.01
    found = loaders._repeat_factors(Records(plain), threshold)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.long)]
)
def test_workers_read_the_same_file(method):
    """A worker of a server is given the same pickled records as one that is spawned."""
    plain = make_records(40)
    loader = loaders.build_train_loader(
        dataset=(Records(plain[:30]) + Records(plain[30:]))[::-1],
        mapper=dict,
        total_batch_size=20,
        num_workers=1,
        seed=0,
        aspect_ratio_grouping=False,
    )
    loader.multiprocessing_context = method
    stream = iter(loader)
    samples = next(stream) + next(stream)
    assert sorted(samples, key=lambda sample: sample["image_id"]) == plain


def test_another_process_opens_the_file_and_keeps_it():
    records = Records(make_records(3))
    copy = pickle.loads(pickle.dumps(records[1:]))
    expected = list(records[1:])
    handle = pickle.dumps(records)
    del records
    assert list(copy) == expected
    del copy
    with pytest.raises(OSError):
        pickle.loads(handle)


def test_a_number_that_became_another_file_is_not_read():
    file = RecordsFile()
    layout = file.write(make_records(2))
    file.map(layout)
    handle = pickle.dumps(file)
    other = RecordsFile()
    other.map(other.write(make_records(2)))
    os.dup2(other._fd, file._fd)
    with pytest.raises(FileNotFoundError, match="gone with their process"):
        pickle.loads(handle)


def test_files_are_closed():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        records = Records(make_records(3))
        pickle.loads(pickle.dumps(records))
    del records
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_leaves_no_objects_here_but_classes_and_log(tiny, caplog):
    """What the child learns and says arrives, as from Detectron2's own way of registering."""
    tiny.content["annotations"][0]["bbox"] = [0, 0, 0, 5]  # is left out with a warning
    tiny.write()
    datasets.register("here", datasets.DatasetSpec(json=tiny.json, images=tiny.images))
    with caplog.at_level(logging.INFO):
        assert len(datasets.load("here")) == 4
    assert "boxes without area" in caplog.text
    register_coco_instances("theirs", {}, tiny.json, tiny.images)
    assert MetadataCatalog.get("theirs").get("thing_classes") is None
    assert len(datasets.load("theirs")) == 4
    assert MetadataCatalog.get("theirs").thing_classes == ["apple", "banana", "cherry"]


def test_classes_of_a_large_file_are_known_without_parsing_it(tiny, monkeypatch):
    register_coco_instances("theirs", {}, tiny.json, tiny.images)
    with monkeypatch.context() as patch:
        patch.setattr(coco_format, "read_json", lambda path: pytest.fail("parsed"))
        patch.setattr(
            "detectron2.data.datasets.coco.load_coco_json", lambda *a: pytest.fail("read")
        )
        assert dataset_classes("theirs") == ["apple", "banana", "cherry"]
    mapping = MetadataCatalog.get("theirs").thing_dataset_id_to_contiguous_id
    records = datasets.load("theirs")  # Detectron2 finds the same
    assert MetadataCatalog.get("theirs").thing_dataset_id_to_contiguous_id == mapping
    assert [o["category_id"] for o in records[0]["annotations"]] == [mapping[1], mapping[7]]


def test_a_users_own_function_runs_here():
    calls = []
    DatasetCatalog.register("own", lambda: calls.append(os.getpid()) or [{"file_name": "x"}])
    assert list(datasets.load("own")) == [{"file_name": "x"}]
    assert calls == [os.getpid()]


class _Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")


def _raise(error):
    raise error


def test_errors_of_a_child_are_raised_here_with_their_place():
    with pytest.raises(UserError, match="wrong") as caught:
        call_in_child(lambda: _raise(UserError("wrong")))
    assert "in _raise" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="odd"):  # cannot be pickled
        call_in_child(lambda: _raise(_Odd(1, 2)))
    with pytest.raises(MemoryError, match="code -9"):
        call_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert call_in_child(os.getpid) != os.getpid()


def test_a_child_that_is_killed_is_one_line(tiny, monkeypatch):
    datasets.register("here", datasets.DatasetSpec(json=tiny.json, images=tiny.images))
    monkeypatch.setattr(coco_format, "read_json", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"'here' could not be read: .* short of memory"):
        datasets.load("here")


_VICTIM = """
import os, sys, time
from d2dense.data import coco_format, datasets
from d2dense.data.records import Records

records = Records([{"file_name": "x" * 1000}] * 1000)
coco_format.read_json = lambda path: print(os.getpid(), flush=True) or time.sleep(600)
datasets.register("here", datasets.DatasetSpec(json=sys.argv[1], images=sys.argv[2]))
datasets.load("here")
"""


def test_nothing_is_left_of_a_killed_process(tiny, tmp_path):
    shared, temporary = set(os.listdir("/dev/shm")), tmp_path / "tmp"
    temporary.mkdir()
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, tiny.json, tiny.images],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )
    reader = int(victim.stdout.readline())
    victim.kill()
    victim.wait()
    deadline = time.monotonic() + 10
    while _is_running(reader):
        assert time.monotonic() < deadline, "the reading child outlives its parent"
        time.sleep(0.05)
    assert list(temporary.iterdir()) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "d2dense" in name]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _load_in_ranks(rank: int, folder: str, json_file: str, images: str) -> None:
    """Load twice, the second time from a file that is not json, and note what happened."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    parse, parsed = coco_format.read_json, Path(folder, f"parsed{rank}")

    def noted(path):
        parsed.write_text("yes")
        return parse(path)

    coco_format.read_json = noted
    register_coco_instances("theirs", {}, json_file, images)
    datasets.register("ours", datasets.DatasetSpec(json=json_file, images=images))
    found = {
        "ours": list(loaders.get_dataset_dicts(names="ours")),
        "parsed": parsed.exists(),
        "theirs": len(loaders.get_dataset_dicts(names="theirs")),
        "classes": MetadataCatalog.get("theirs").thing_classes,
    }
    if rank == 0:
        Path(json_file).write_text('{"images": [')
    try:
        loaders.get_dataset_dicts(names="ours")
    except UserError as error:
        found["error"] = str(error)
    DatasetCatalog.register("broken", lambda: 1 / 0)
    try:
        loaders.get_dataset_dicts(names="broken")
    except (ZeroDivisionError, RuntimeError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_one_rank_reads_for_all_and_its_errors_reach_all(tiny):
    args = (str(tiny.root), tiny.json, tiny.images)
    mp.start_processes(_load_in_ranks, nprocs=3, args=args, start_method="forkserver")
    found = [json.loads((tiny.root / f"{rank}.json").read_text()) for rank in range(3)]
    assert [each["parsed"] for each in found] == [True, False, False]
    assert found[0]["ours"] == found[1]["ours"] == found[2]["ours"]
    assert [r["image_id"] for r in found[1]["ours"]] == [10, 11, 12]
    for each in found:
        assert each["theirs"] == 3
        assert each["classes"] == ["apple", "banana", "cherry"]
        assert "is not valid json" in each["error"]
        assert each["error"] == found[0]["error"]
    assert found[0]["failure"].startswith("ZeroDivisionError")
    assert "process 0 could not read the data: ZeroDivisionError" in found[1]["failure"]
