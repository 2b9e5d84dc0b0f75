"""Runs the Triton kernels in Triton's interpreter, on the CPU, and prints how far they are from the
plain formula in float64. A process of its own: Triton looks at TRITON_INTERPRET when imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from d2dense.layers import deformable_triton
from tests.layers.deformable_cases import SIZES, case, plain, with_gradients


def relative_errors(grad, value, shapes, locations, weights):
    """Return the largest errors of the result and of all gradients, relative to the largest of the
    numbers, and the types of all.
    """
    found = (
        deformable_triton.forward(value, shapes, locations, weights),
        *deformable_triton.backward(grad, value, shapes, locations, weights),
    )
    exact = [x.double() for x in (grad, value, locations, weights)]
    expected = with_gradients(plain, *exact[:2], shapes, *exact[2:])
    errors = [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(found, expected, strict=True)
    ]
    return {"errors": errors, "types": [str(x.dtype).removeprefix("torch.") for x in found]}


def cases():
    for name, sizes in SIZES.items():
        yield name, "float32", case(*sizes, dtype=torch.float32)
    for dtype in ("float16", "bfloat16"):
        value, *rest = case(*SIZES["odd maps"], dtype=torch.float32)
        yield dtype, dtype, (value.to(getattr(torch, dtype)), *rest)
    for spread in (1e4, 1e30):
        yield (
            f"spread {spread:g}",
            "float32",
            case(spread=spread, shapes=((3, 4),), dtype=torch.float32),
        )
    value, shapes, locations, weights = case(*SIZES["odd maps"], dtype=torch.float32)
    strided = value.transpose(1, 3).contiguous().transpose(1, 3)
    yield "strides", "float32", (strided, shapes, locations[:1].expand_as(locations), weights)


def not_places():
    """Return whether points at NaN and infinity read nothing and leave all gradients finite."""
    value, shapes, locations, weights = case(*SIZES["odd maps"], dtype=torch.float32)
    for query, bad in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        locations[:, query] = bad
    result = deformable_triton.forward(value, shapes, locations, weights)
    grads = deformable_triton.backward(result, value, shapes, locations, weights)
    return not result[:, :4].any() and all(bool(torch.isfinite(x).all()) for x in grads)


def main():
    torch.manual_seed(0)
    report = {}
    for name, dtype, (value, shapes, locations, weights) in cases():
        n, q, m, d = *weights.shape[:3], value.shape[3]
        grad = torch.randn(n, q, m * d).to(value.dtype)
        found = relative_errors(grad, value, shapes, locations, weights)
        report[name] = {"dtype": dtype, **found}
    print(json.dumps({"cases": report, "not places read nothing": not_places()}))


if __name__ == "__main__":
    main()
