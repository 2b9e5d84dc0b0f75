"""Two processes of one image learn what one process of two does: all losses are divided by numbers
of the whole batch; also where a process, or nobody, has objects (no parameter is left out).
"""

from __future__ import annotations

import pytest
import torch

from d2dense.engine.launch import launch
from tests.engine.workers import arguments
from tests.projects.codetr import workers


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codetr")
    launch(workers.run, arguments(output_dir=str(folder)))
    return [torch.load(folder / f"found{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["both", "one"])
def test_losses_and_gradients_equal_those_of_one_process(found, case):
    expected = workers.step(workers.model(), workers.batch(case))
    both = [each[case]["losses"] for each in found]
    assert both[0].keys() == both[1].keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        mean = sum(each[name] for each in both) / 2
        torch.testing.assert_close(mean, value, rtol=2e-5, atol=1e-6, msg=name)
    for name, value in expected["gradients"].items():
        scale = float(value.abs().max())
        for each in found:
            torch.testing.assert_close(
                each[case]["gradients"][name], value, rtol=0, atol=1e-4 * scale + 1e-6, msg=name
            )


def test_without_objects_no_parameter_is_left_out(found):
    """The mean number of objects counts as 1 then, however many processes there are."""
    for each in found:
        assert all(loss.isfinite() for loss in each["none"]["losses"].values())
        for name, gradient in each["none"]["gradients"].items():
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert torch.equal(gradient, found[0]["none"]["gradients"][name]), name
