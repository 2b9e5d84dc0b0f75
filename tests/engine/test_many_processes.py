"""Several processes compute what one computes with the whole batch, and never wait for ever.

Equality is meant to float32 rounding: sums over a batch are added in another order. The detector is
set up so that its losses are means over images (see ``detectors.tiny_config``); with Detectron2's
usual random sampling each process normalises by what it drew itself, and one process with the
whole batch is another, equally good, estimate of the same gradient.
"""

from __future__ import annotations

import pytest
import torch

from d2dense.engine.launch import launch
from d2dense.engine.trainer import Trainer
from tests.engine import detectors, many_workers
from tests.engine.workers import arguments


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four processes found, by rank; two of them also worked as a pair."""
    folder = tmp_path_factory.mktemp("many")
    launch(many_workers.run, arguments(num_gpus=4, output_dir=str(folder)))
    return [torch.load(folder / f"found{rank}.pth", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def alone():
    """The detector in one process: plain batch norm, the whole batch."""
    model = detectors.build(detectors.tiny_config(norm="BN"))
    images = [detectors.image(n, many_workers.OBJECTS) for n in range(many_workers.IMAGES)]
    return many_workers.train(model, images)


@pytest.mark.parametrize(("norm", "alone"), [("none", "none"), ("SyncBN", "BN")])
def test_four_processes_train_the_fake_model_like_one(found, tmp_path, norm, alone):
    """By the trainer, which replaces PyTorch's synchronised norms on the CPU."""
    trainer = Trainer(many_workers.FakeTraining(tmp_path, norm=alone))
    trainer.train()
    for each in found:
        assert each["fake", norm].keys() == trainer.model.state_dict().keys()
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(each["fake", norm][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_detector_with_synchronised_norms_trains_like_one_process(found, alone, ranks):
    """Tolerance: 1e-4 of the largest element of each gradient, 5e-5 of each weight tensor."""
    for rank in range(ranks):
        case = found[rank]["detector", ranks]
        assert case["replaced"] > 5
        for name, value in alone["gradients"].items():
            assert value.any(), name
            limit = 1e-4 * float(value.abs().max()) + 1e-7
            torch.testing.assert_close(case["gradients"][name], value, rtol=0, atol=limit)
        assert set(case["state"]) == set(alone["state"])
        for name, value in alone["state"].items():
            limit = 5e-5 * float(value.abs().max()) + 1e-7
            torch.testing.assert_close(case["state"][name], value, rtol=0, atol=limit)


@pytest.mark.parametrize("case", [*many_workers.COUNTS, "no_regions"])
def test_no_head_of_fscascade_waits_for_objects(found, case):
    """Without ``find_unused_parameters``, whatever is shared between stages."""
    names = {key for key in found[0] if key[0] == "heads" and key[2] == case}
    assert len(names) == (1 if case == "no_regions" else len(many_workers.VARIANTS))
    for each in found[:2]:
        assert {key: each[key] for key in names} == dict.fromkeys(names, [True] * 3)


@pytest.mark.parametrize("case", many_workers.COUNTS)
@pytest.mark.parametrize("name", many_workers.ARCHITECTURES)
def test_no_detector_waits_for_objects(found, name, case):
    """Detectron2's own heads give every parameter a gradient, too: zero where nothing is found."""
    for each in found[:2]:
        assert each["model", name, case] == [True] * 3
