"""Training that does not break, whatever objects there are and in 16 bits: every detector of the
family, with and without auxiliary heads.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.projects.codetr import family

SIZE = (64, 96)


def _thousand():
    low = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 60
    side = torch.rand(1000, 2, generator=torch.Generator().manual_seed(1)) * 35
    return torch.cat([low, low + side + 0.5], dim=1).tolist()


ODD = [
    [10, 10, 10.001, 10.001],  # tiny
    [3, 3, 3.5, 3.5],
    [-1e4, -1e4, 1e4, 1e4],  # huge
    [0, 0, 128, 96],
    [10, 10, 10, 40],  # flat
    [20, 20, 20, 20],
    [5, 5, 50, 5],
    *[[10, 20, 60, 70]] * 3,  # equal
    [200, 200, 260, 260],  # outside
    [-50, -50, -10, -10],
]
# of two images
OBJECTS = {"odd": (ODD, []), "thousand": (_thousand(), [[10, 20, 60, 70]]), "none": ([], [])}


def step(model, batch):
    """Losses, and gradients by name, of one step."""
    model.zero_grad()
    torch.manual_seed(1)
    losses = model(batch)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check(losses, gradients):
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name
        assert loss < 1e4, name
        if "loss_iou" in name:  # weight 2, once per object
            assert -1e-4 < loss < 4.001, name
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


@family.every
def test_any_objects(base, heads):
    """Every parameter takes part, also where there are none."""
    model = family.detector(base, *heads)
    for name, (first, second) in OBJECTS.items():
        if name == "thousand" and (base == "dino_5scale" or "mask_rcnn" in heads):
            continue  # much time for what other cases show
        check(*step(model, [family.image(*SIZE, first), family.image(50, 70, second)]))


# what networks do in 16 bits beside moving numbers around: products, and what follows them at once
_NETWORK = {
    "convolution", "addmm", "mm", "bmm", "baddbmm", "deformable_sampling",
    "_scaled_dot_product_flash_attention_for_cpu", "native_layer_norm", "native_group_norm",
    "upsample_bilinear2d", "relu", "relu_", "tanh", "_prelu_kernel", "add", "add_", "mul", "where",
    "masked_fill", "masked_fill_",
}  # fmt: skip
_MOVES = {
    "detach", "view", "_unsafe_view", "t", "transpose", "permute", "clone", "cat", "stack", "split",
    "split_with_sizes", "select", "slice", "gather", "expand", "unsqueeze", "alias", "new_zeros",
    "new_ones", "_to_copy", "amax", "unbind", "squeeze", "index",
}  # fmt: skip


class HalfOperators(TorchDispatchMode):
    """Notes the operators that take 16-bit numbers."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_flatten((args, kwargs))[0]
        if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 2 and x.is_floating_point()
               for x in given):  # fmt: skip
            self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@family.every
def test_autocast(base, heads):
    """In 16 bits nothing but the network itself is computed: no box, cost or loss
    (whose logarithms, quotients, sums and extrema would be noticed).
    """
    model = family.detector(base, *heads)
    batch = [family.image(*SIZE, ODD), family.image(50, 70)]
    for dtype in (torch.bfloat16, torch.float16) if len(heads) == 2 else (torch.bfloat16,):
        with torch.autocast("cpu", dtype=dtype), HalfOperators() as seen:
            torch.manual_seed(1)
            losses = model(batch)
        assert {"convolution", "addmm"} <= seen.names <= _NETWORK | _MOVES
        model.zero_grad()
        sum(losses.values()).backward()
        check(losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
