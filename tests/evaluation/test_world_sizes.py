"""Results do not depend on how many processes evaluate, or on who sees which image."""

from __future__ import annotations

from argparse import Namespace

import pytest

from d2dense.engine.launch import launch
from tests.evaluation import worker
from tests.evaluation.samples import unregister

NAMES = ("loop_coco", "loop_lvis", "loop_sem_seg", "loop_instance", "loop_semantic")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Datasets of 5 images, which neither 2 nor 3 nor 4 divide, and of 1, which leaves processes
    without any; one process has evaluated them.
    """
    pytest.importorskip("lvis")
    folder = tmp_path_factory.mktemp("evaluations")
    found = {count: folder / str(count) for count in (5, 1)}
    for count, root in found.items():
        root.mkdir()
        worker.write_data(root, count)
    evaluate(found, 1)
    yield found
    for name in NAMES:
        unregister(name)


def evaluate(roots, size):
    place = {"num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": "cpu"}
    launch(worker.run, Namespace(num_gpus=size, roots=[str(r) for r in roots.values()], **place))


@pytest.mark.parametrize(
    "size", [3, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
def test_any_number_of_processes_gives_the_same(roots, size):
    evaluate(roots, size)
    for root in roots.values():
        expected = worker.read(root, "in_order", 1)
        assert {name for name, *_ in expected} == set(NAMES)
        for deal in ("in_order", "padded"):
            found = worker.read(root, deal, size)
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, abs=1e-9), deal


def test_the_results_are_worth_comparing(roots):
    results = worker.read(roots[5], "in_order", 1)
    for key in [
        ("loop_coco", "bbox", "AP"),
        ("loop_coco", "segm", "AP"),
        ("loop_lvis", "bbox", "AP"),
        ("loop_sem_seg", "sem_seg", "mIoU"),
        ("loop_sem_seg", "sem_seg", "bIoU"),
        ("loop_instance", "segm", "AP"),
        ("loop_semantic", "sem_seg", "iIoU"),
        ("loop_semantic", "sem_seg", "bIoU"),
    ]:
        assert 1 < results[key] < 99, key
    few = worker.read(roots[1], "in_order", 1)
    assert few["loop_coco", "bbox", "AP"] != pytest.approx(results["loop_coco", "bbox", "AP"])
