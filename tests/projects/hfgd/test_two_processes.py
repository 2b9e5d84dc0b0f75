"""Two processes of two images learn what one process of four does: class centres, means, counts of
pixels and batch norms are those of all images, in the losses and in the gradients (float64).
"""

from __future__ import annotations

import pytest
import torch

from d2dense.engine.launch import launch
from d2dense.layers import has_sync_norms
from tests.engine.workers import arguments
from tests.projects.hfgd import workers

CLOSE = {"rtol": 1e-7, "atol": 1e-12}
EXACT_CASES = [case for case in workers.CASES if case != "official_means"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hfgd")
    launch(workers.run, arguments(output_dir=str(folder)))
    return [torch.load(folder / f"found{rank}.pth", weights_only=True) for rank in range(2)]


def alone(case):
    return workers.step(workers.model(case, ""), workers.batch())


@pytest.mark.parametrize("case", EXACT_CASES)
def test_losses_gradients_and_statistics_equal_those_of_one_process(found, case):
    expected = alone(case)
    for name, value in expected["losses"].items():
        mean = sum(each[case]["losses"][name] for each in found) / 2
        torch.testing.assert_close(mean, value, **CLOSE)
        if "car" in name:  # every process computes the whole one
            assert torch.equal(found[0][case]["losses"][name], found[1][case]["losses"][name])
    for part in ("gradients", "buffers"):
        for name, value in expected[part].items():
            for each in found:
                scale = float(value.double().abs().max())
                torch.testing.assert_close(
                    each[case][part][name], value, rtol=0, atol=1e-8 * scale + 1e-14, msg=name
                )


def test_official_means_differ_but_centres_are_shared(found):
    """c2c is a function of the centres alone; the other two are squares of each process's mean."""
    expected, case = alone("official_means")["losses"], "official_means"
    both = [each[case]["losses"] for each in found]
    for losses in both:
        torch.testing.assert_close(losses["loss_car_c2c"], expected["loss_car_c2c"], **CLOSE)
    for name in ("loss_car_intra", "loss_car_c2p"):
        assert not torch.allclose(both[0][name], both[1][name], rtol=1e-4)
        roots = [float(losses[name].sqrt()) for losses in both]
        assert sum(roots) / 2 == pytest.approx(float(expected[name].sqrt()), rel=1e-7)


def test_a_failed_forward_cannot_be_replaced():
    """The engine must know that others wait for this process in its forward."""
    assert has_sync_norms(workers.model("usfpn", ""))
