"""Parameters without a gradient are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dense.engine.unused import require_gradients
from d2dense.errors import UserError


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def test_parameters_that_no_loss_reaches():
    model = nn.ModuleDict(
        {"used": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)}
    )
    model["used"](torch.ones(1, 2)).sum().mul(0).backward()
    require_gradients(trainable(model))  # a zero is a gradient
    model["spare"] = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"depends on spare\.weight, spare\.bias; .*UNUSED_PARAM"):
        require_gradients(trainable(model))
    model["more"] = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"spare\.bias, more\.0\.weight and 3 more;"):
        require_gradients(trainable(model))
