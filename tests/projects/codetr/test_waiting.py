"""How often a training step makes the host wait for the device: every detector of the family, with
and without auxiliary heads.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from codetr.heads import HEADS
from tests.modeling.host_waits import HostWaits
from tests.projects.codetr import family

SIZES = [(64, 96), (50, 70), (64, 64)]


def budget(heads, images):
    """Reads of a step: the matching; what becomes queries, for all heads together; proposals of
    each image, and of which map their features are; how many regions have masks, and their maps.
    """
    proposals = sum(issubclass(HEADS[name], HEADS["faster_rcnn"]) for name in heads)
    return 1 + (len(heads) > 0) + proposals * (1 + images) + 2 * heads.count("mask_rcnn")


def waiting_model(base, heads):
    model = family.detector(base, *heads)
    for head in model.auxiliary_heads:
        if hasattr(head, "rpn"):  # of more proposals torchvision suppresses per class on a CPU
            head.rpn.train_limits = (40, *head.rpn.train_limits[1:])
    return model


@family.every
def test_waits_of_a_step(base, heads):
    """As many as budgeted, whatever the number of objects."""
    model = waiting_model(base, heads)
    for counts in ((3, 2), (0, 9, 4)) if len(heads) == 2 else ((3, 2),):
        batch = family.batch(counts, SIZES[: len(counts)])
        with HostWaits(model) as waits:
            sum(model(batch).values()).backward()
        assert sum(waits.sends.values()) == 0, waits.sends
        assert sum(waits.reads.values()) <= budget(heads, len(counts)), waits.reads


def test_waits_are_seen():
    class Reader(torch.nn.Linear):
        def forward(self, x):
            y = self.weight.to("cpu") @ x.to(self.weight.device)
            far = (self.bias > 0).nonzero()
            mask = self.bias[self.bias > 0]
            return (
                y,
                far,
                mask,
                float(self.bias.detach().sum()),
                self.bias.new_tensor([1.0]),
                y.tolist(),
            )

    model = Reader(3, 2)
    with HostWaits(model) as waits:
        model(torch.randn(3))
    assert sum(waits.sends.values()) == 2
    assert sum(waits.reads.values()) == 4  # what is on the host is not read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@family.every
def test_waits_of_a_step_on_a_gpu(base, heads):
    model = waiting_model(base, heads).cuda()
    batch = family.batch((3, 2), SIZES[:2])
    sum(model(batch).values()).backward()  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sum(model(batch).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchron" in str(each.message) for each in caught) <= budget(heads, len(batch))
