"""Blocks of EVA-02's vision transformer for detection, written from its description, one token and
one pair of channels at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated(x: Tensor, place: tuple[int, int], lengths: tuple[float, float]) -> Tensor:
    """Turn the channels of one head ``(D,)``: the first half by the row, the second by the column,
    neighbouring channels together. ``lengths`` are those of the grid that is 16 units long.
    """
    half = len(x) // 2
    result = torch.empty_like(x)
    for axis in (0, 1):
        for pair in range(half // 2):
            angle = place[axis] / lengths[axis] * 16 * 10000 ** (-2 * pair / half)
            i = axis * half + 2 * pair
            cos, sin = math.cos(angle), math.sin(angle)
            result[i] = x[i] * cos - x[i + 1] * sin
            result[i + 1] = x[i + 1] * cos + x[i] * sin
    return result


def attention(tokens: Tensor, state: dict[str, Tensor], heads: int, lengths) -> Tensor:
    """Attention among all tokens of ``(H, W, C)``."""
    h, w, c = tokens.shape
    size = c // heads
    places = [(y, x) for y in range(h) for x in range(w)]
    x = tokens.reshape(h * w, c)
    q = x @ state["q_proj.weight"].T + state["q_proj.bias"]
    k = x @ state["k_proj.weight"].T
    v = x @ state["v_proj.weight"].T + state["v_proj.bias"]
    out = torch.empty_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        queries = torch.stack([rotated(q[i, own], p, lengths) for i, p in enumerate(places)])
        keys = torch.stack([rotated(k[i, own], p, lengths) for i, p in enumerate(places)])
        for i, query in enumerate(queries):
            scores = torch.stack([query @ key for key in keys]) / math.sqrt(size)
            out[i, own] = scores.softmax(0) @ v[:, own]
    return (out @ state["proj.weight"].T + state["proj.bias"]).reshape(h, w, c)


def windowed_attention(tokens: Tensor, state: dict[str, Tensor], heads: int, side: int) -> Tensor:
    """Attention within squares; the last ones are filled up with zeros that are tokens too."""
    h, w, c = tokens.shape
    result = torch.empty_like(tokens)
    for top in range(0, h, side):
        for left in range(0, w, side):
            window = tokens.new_zeros(side, side, c)
            part = tokens[top : top + side, left : left + side]
            window[: part.shape[0], : part.shape[1]] = part
            out = attention(window, state, heads, (side, side))
            result[top : top + side, left : left + side] = out[: part.shape[0], : part.shape[1]]
    return result


def block(tokens, state, heads, *, window=None, rotary_side=None) -> Tensor:
    """A whole block on ``(H, W, C)``, with the parameters that ``state`` has."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    own = part("attn.attention.")
    if window is None:
        lengths = [rotary_side or length for length in tokens.shape[:2]]
        tokens = tokens + attention(norm(tokens, "norm1"), own, heads, lengths)
    else:
        tokens = tokens + windowed_attention(norm(tokens, "norm1"), own, heads, window)
    x = norm(tokens, "norm2")
    gate, value = (
        F.linear(x, state[f"mlp.{k}.weight"], state[f"mlp.{k}.bias"]) for k in ("fc1_g", "fc1_x")
    )
    hidden = norm(gate * torch.sigmoid(gate) * value, "mlp.norm")
    return tokens + F.linear(hidden, state["mlp.fc2.weight"], state["mlp.fc2.bias"])


def resized(grid: Tensor, height: int, width: int) -> Tensor:
    """Bicubic interpolation (a = -0.75) of ``(H, W, C)`` with pixel centres at halves; beyond the
    border its last values are repeated.
    """

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def matrix(source: int, target: int) -> Tensor:
        m = torch.zeros(target, source)
        for i in range(target):
            place = (i + 0.5) * source / target - 0.5
            for k in range(math.floor(place) - 1, math.floor(place) + 3):
                m[i, min(max(k, 0), source - 1)] += kernel(place - k)
        return m

    rows, columns = matrix(grid.shape[0], height), matrix(grid.shape[1], width)
    return torch.einsum("yh,xw,hwc->yxc", rows, columns, grid)
