"""Bad samples in training: replaced in the same way everywhere, logged once, counted."""

from __future__ import annotations

import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.utils import comm
from PIL import Image, ImageFile

from d2dense.data import augmentations
from d2dense.data.datasets import register_custom
from d2dense.data.loaders import build_test_loader, build_train_loader, get_dataset_dicts
from d2dense.data.mappers import DetectionMapper, SemanticMapper
from d2dense.data.workers import clear_deaths
from d2dense.errors import UserError
from tests.data.spoil import LABELS, PICTURES, truncate

LOGGER = "d2dense.data.samples"
BAD = 5  # the image that tests spoil: wide, like all of even number and this one


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve JPEGs, every second one tall, except that the fifth is wide."""
    rng = np.random.default_rng(0)
    for number in range(12):
        width, height = (64, 48) if number % 2 == 0 or number == BAD else (48, 64)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", quality=90)
    return tmp_path


def records_of(folder: Path) -> list[dict]:
    records = []
    for number in range(12):
        wide = number % 2 == 0 or number == BAD
        records.append(
            {
                "file_name": str(folder / f"{number}.jpg"),
                "image_id": number,
                "width": 64 if wide else 48,
                "height": 48 if wide else 64,
                "annotations": [
                    {"bbox": [4, 6, 30, 40], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
                ],
            }
        )
    return records


def mapper(**options) -> DetectionMapper:
    steps = augmentations.lsj(image_size=32, min_scale=0.5, max_scale=1.5)
    return DetectionMapper(is_train=True, augmentations=steps, **options)


def train_loader(dataset, **options):
    defaults = {"total_batch_size": 2, "num_workers": 0, "seed": 3, "mapper": mapper()}
    return build_train_loader(dataset=dataset, **(defaults | options))


def take(loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(loader, count))


def ids(batches) -> list[list[int]]:
    return [[sample["image_id"] for sample in batch] for batch in batches]


def equal(first, second) -> bool:
    pairs = list(zip(itertools.chain(*first), itertools.chain(*second), strict=True))
    return all(
        a["image_id"] == b["image_id"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        for a, b in pairs
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_bad_picture_is_replaced_and_named_once(folder, caplog, kind, workers):
    spoil, reason = PICTURES[kind]
    path = folder / f"{BAD}.jpg"
    spoil(path)
    loader = train_loader(records_of(folder), num_workers=workers, max_bad_share=0.5)
    batches = take(loader, 30)  # five epochs
    assert all(len(batch) == 2 for batch in batches)
    assert BAD not in itertools.chain(*ids(batches))
    found = [r for r in caplog.records if r.name == LOGGER]
    assert [r.levelname for r in found] == ["WARNING"]
    assert str(path) in found[0].getMessage()
    assert re.search(reason, found[0].getMessage())
    assert loader.bad_samples.bad >= 4
    assert loader.bad_samples.drawn == loader.bad_samples.bad + 60


def spoil_rle(record: dict, code: dict) -> None:
    record["annotations"][0]["segmentation"] = code


def rle(height: int, width: int) -> dict:
    return mask_util.encode(np.ones((height, width), np.uint8, order="F"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (rle(48, 63), "is 63x48, but the image is 64x48"),
        ({"size": [48, 64], "counts": b"52"}, "runs of 7 pixels"),
        ({"size": [48, 64], "counts": b"~~~"}, "cannot be decoded"),
    ],
)
def test_a_bad_mask_is_a_bad_sample(folder, caplog, code, reason):
    records = records_of(folder)
    for record in records:
        spoil_rle(record, rle(record["height"], record["width"]))
    spoil_rle(records[BAD], code)
    loader = train_loader(records, mapper=mapper(use_instance_mask=True), max_bad_share=0.5)
    batches = take(loader, 15)
    assert BAD not in itertools.chain(*ids(batches))
    assert re.search(rf"{BAD}\.jpg.*{reason}", caplog.text)
    assert all(len(sample["instances"].gt_masks) for sample in itertools.chain(*batches))


@pytest.mark.parametrize("kind", LABELS)
def test_a_bad_label_map_is_a_bad_sample(tiny_semantic, caplog, kind):
    spoil, reason = LABELS[kind]
    entries = {
        "images": tiny_semantic.images,
        "labels": tiny_semantic.labels,
        "classes": tiny_semantic.classes,
        "label_suffix": "_label.png",
        "ignore_label": 9,
    }
    name = register_custom({"train": entries})["train"]
    records = list(get_dataset_dicts(names=name))
    spoil(Path(records[1]["sem_seg_file_name"]))
    steps = augmentations.semantic(min_size=(40,), crop_size=(16, 24))
    loader = train_loader(
        records, mapper=SemanticMapper(is_train=True, augmentations=steps), max_bad_share=0.9
    )
    batches = take(loader, 6)
    assert {sample["image_id"] for sample in itertools.chain(*batches)} == {"city/0", "city/2"}
    warned = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert len(warned) == 1
    assert re.search(rf"1_label\.png.*({reason})|({reason}).*1_label\.png", warned[0])


# Determinism


@pytest.fixture
def spoilt(folder) -> list[dict]:
    for number in (BAD, 3, 8):
        (folder / f"{number}.jpg").write_bytes(b"")
    return records_of(folder)


@pytest.mark.parametrize("grouping", [True, False])
def test_replacements_do_not_depend_on_workers_or_resuming(spoilt, grouping):
    options = {"aspect_ratio_grouping": grouping, "max_bad_share": 0.9}
    whole = take(train_loader(spoilt, **options), 18)
    assert equal(whole, take(train_loader(spoilt, num_workers=1, **options), 18))
    assert equal(whole, take(train_loader(spoilt, num_workers=2, **options), 18))
    assert equal(whole[7:], take(train_loader(spoilt, start_batch=7, **options), 11))
    assert not equal(whole, take(train_loader(spoilt, seed=4, **options), 18))


def test_replacements_keep_the_rest_of_the_stream_and_the_orientation(folder):
    records = records_of(folder)
    before = take(train_loader(records), 18)
    (folder / f"{BAD}.jpg").unlink()
    after = take(train_loader(records, max_bad_share=0.9), 18)
    replaced = set()
    for a, b in zip(itertools.chain(*before), itertools.chain(*after)):
        if a["image_id"] == BAD:
            assert b["width"] > b["height"]
            replaced.add(b["image_id"])
        else:
            assert equal([[a]], [[b]])
    assert len(replaced) > 1  # not always the same stand-in


def test_replacements_are_shared_by_processes(spoilt, monkeypatch):
    options = {"aspect_ratio_grouping": False, "max_bad_share": 0.9, "total_batch_size": 4}
    alone = take(train_loader(spoilt, **options), 8)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(train_loader(spoilt, **options), 8))
    for step, batch in enumerate(alone):
        assert equal([batch[0::2]], [shares[0][step]])
        assert equal([batch[1::2]], [shares[1][step]])


def test_without_a_good_image_of_an_orientation_the_other_one_helps(folder):
    for number in (1, 3, 7, 9, 11):  # all tall ones
        (folder / f"{number}.jpg").write_bytes(b"")
    batches = take(train_loader(records_of(folder), max_bad_share=1.0), 12)
    assert {len(batch) for batch in batches} == {2}


# Limits


def test_the_share_of_bad_samples_ends_the_run(spoilt):
    loader = train_loader(spoilt, max_bad_share=0.1)
    with pytest.raises(UserError) as caught:
        take(loader, 100)
    message = str(caught.value)
    assert "\n" not in message
    counts = loader.bad_samples
    assert counts.bad >= 10
    assert counts.bad / counts.drawn > 0.1
    assert f"{counts.bad} of the {counts.drawn} samples" in message
    assert "DATALOADER.MAX_BAD_SHARE / dataloader.train.max_bad_share" in message
    assert "8.jpg" in message or "3.jpg" in message or f"{BAD}.jpg" in message
    # three of twelve files are a quarter
    assert counts.bad / counts.drawn == pytest.approx(0.25, abs=0.12)


def test_it_ends_at_the_same_point_for_any_number_of_workers(spoilt):
    ends = []
    for workers in (0, 2):
        batches, loader = [], train_loader(spoilt, num_workers=workers)
        with pytest.raises(UserError):
            batches.extend(iter(loader))
        ends.append((loader.bad_samples.bad, loader.bad_samples.drawn))
    assert ends[0] == ends[1]


def test_one_bad_sample_among_the_first_few_is_survived_unless_none_is_allowed(folder):
    (folder / f"{BAD}.jpg").write_bytes(b"")
    records = records_of(folder)
    loader = train_loader(records, max_bad_share=0.01)
    take(loader, 12)
    assert loader.bad_samples.bad >= 1
    strict = train_loader(records, max_bad_share=0.0)
    with pytest.raises(UserError, match=f"{BAD}.jpg"):
        take(strict, 12)
    assert strict.bad_samples.bad == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_bad_files_ends_in_seconds(folder, workers, share):
    for path in folder.iterdir():
        path.unlink()
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"\(100\.0%\).*No such file"):
        take(train_loader(records_of(folder), num_workers=workers, max_bad_share=share), 1)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_named(folder, share):
    with pytest.raises(UserError, match=r"MAX_BAD_SHARE .*expected a share from 0 to 1"):
        train_loader(records_of(folder), max_bad_share=share)


# Mistakes that are no bad samples


class Wrong(augmentations.T.Augmentation):
    """Fails as a programming mistake would."""

    def get_transform(self, image):
        return [][image.shape[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_an_augmentation_ends_the_run_and_names_the_file(folder, workers):
    wrong = DetectionMapper(is_train=True, augmentations=[Wrong()])
    for build in (train_loader, lambda dataset, **o: build_test_loader(dataset=dataset, **o)):
        with pytest.raises(RuntimeError, match=r"\d+\.jpg failed with IndexError") as caught:
            take(build(records_of(folder), mapper=wrong, num_workers=workers), 3)
        assert not isinstance(caught.value, UserError)
        if workers == 0:
            assert isinstance(caught.value.__cause__, IndexError)


def die(record):
    if record["image_id"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return record


def test_a_killed_worker_is_one_line_with_its_keys(folder):
    with pytest.raises(UserError, match=r"DATALOADER\.NUM_WORKERS.*shm-size") as caught:
        take(train_loader(records_of(folder), mapper=die, num_workers=2), 50)
    assert "\n" not in str(caught.value)


def outgrow(record):
    # as full shared memory does: no file of this process can have 2 MB
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return record | {"image": torch.zeros(2 << 20, dtype=torch.uint8)}


def test_full_shared_memory_is_one_line_instead_of_waiting_for_ever(folder):
    with pytest.raises(UserError, match=r"File too large.*NUM_WORKERS.*shm-size") as caught:
        take(train_loader(records_of(folder), mapper=outgrow, num_workers=2), 3)
    assert "\n" not in str(caught.value)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, clear_deaths():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(caught.value, UserError)
    # torch's handler of dead children raises wherever the training process is
    with pytest.raises(UserError, match="killed by signal: Killed"), clear_deaths():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


SIGNALS = """
import signal, sys, time
from d2dense.data.loaders import build_train_loader

received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))


def mapper(record):
    if sys.argv[1] == "stuck" and record["image_id"] == 3:
        time.sleep(600)
    return record


records = [{"file_name": str(i), "image_id": i} for i in range(8)]
loader = build_train_loader(
    dataset=records, mapper=mapper, total_batch_size=2, num_workers=2, seed=0
)
batches = iter(loader)
next(batches)
print("ready", flush=True)
if sys.argv[1] == "signals":
    while len(received) < 3:
        next(batches)
    for _ in range(100):
        next(batches)
    print("went on", flush=True)
"""


@pytest.mark.parametrize("case", ["signals", "stuck"])
def test_signals_to_the_process_group_leave_the_workers_alone_and_exit_does_not_hang(case):
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALS, case],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        if case == "signals":
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.killpg(process.pid, number)
                time.sleep(0.2)
        out, _ = process.communicate(timeout=60)
        assert (out, process.returncode) == ("went on\n" if case == "signals" else "", 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_truncated_files_are_refused_even_if_another_library_allows_them(folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    truncate(folder / f"{BAD}.jpg")
    loader = train_loader(records_of(folder), num_workers=1, max_bad_share=0.5)
    assert BAD not in itertools.chain(*ids(take(loader, 12)))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
