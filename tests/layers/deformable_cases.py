"""Arguments of deformable sampling, and the gradients of its ways."""

import torch

from d2dense.layers.deformable_benchmark import plain_formula as plain

__all__ = ["ODD", "SIZES", "case", "plain", "with_gradients"]

ODD = ((7, 5), (1, 3), (4, 1))
# shapes, images, queries, heads, channels of a head, points
SIZES = {
    "odd maps": (ODD, 2, 6, 2, 3, 2),
    "one pixel, one of all": (((1, 1),), 1, 1, 1, 1, 1),
    "one level": (((5, 6),), 2, 4, 3, 5, 4),
    "many levels": (
        ((9, 8), (8, 9), (3, 3), (2, 2), (1, 2), (2, 1), (1, 1), (3, 1)),
        1,
        3,
        2,
        4,
        1,
    ),
    "wide heads": (((6, 6), (3, 3)), 1, 9, 2, 64, 3),
    "more queries than pixels": (((2, 2), (1, 1)), 3, 25, 4, 8, 2),
}


def case(shapes, n=2, q=6, heads=2, width=3, points=2, *, spread=1.6, dtype=torch.float64):
    """Random arguments; some points lie outside."""
    size = sum(h * w for h, w in shapes)
    value = torch.randn(n, size, heads, width, dtype=dtype)
    locations = (torch.rand(n, q, heads, len(shapes), points, 2, dtype=dtype) - 0.5) * spread + 0.5
    weights = torch.randn(n, q, heads, len(shapes), points, dtype=dtype)
    return value, shapes, locations, weights


def with_gradients(function, grad, value, shapes, locations, weights):
    """Return the result and the gradients of value, locations and weights."""
    tensors = [x.detach().requires_grad_() for x in (value, locations, weights)]
    result = function(tensors[0], shapes, *tensors[1:])
    return result.detach(), *torch.autograd.grad(result, tensors, grad)
