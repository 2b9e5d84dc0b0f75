"""Attention of one image, head and query at a time."""

import math

import torch
from torch.nn.functional import layer_norm, linear

from d2dense.modeling.detr import Memory

C, HEADS, WIDTH = 16, 4, 4  # channels, heads, channels of a head


def noisy(module):
    """Parameters away from their initial values, biases and norms included."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module


def memory(n=2, shape=(3, 4), seed=5):
    g = torch.Generator().manual_seed(seed)
    tokens, positions = torch.randn(2, n, shape[0] * shape[1], C, generator=g)
    padding = torch.zeros(n, *shape, dtype=torch.bool)
    padding[-1, 2:] = True
    padding[-1, :, 3:] = True
    return Memory(tokens, [shape], padding.flatten(1), torch.ones(n, 1, 2), positions)


def rows(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(halves, values, blocked, output):
    """Softmax over keys, for every image, head and query alone.

    Args:
        halves: pairs of queries (N, Q, C) and keys (N, S, C), compared side by side in each head
        blocked: (image, query, key) -> bool
    """
    n, q, _ = halves[0][0].shape
    result = torch.zeros(n, q, C)
    for i in range(n):
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            for j in range(q):
                keys = [k for k in range(values.shape[1]) if not blocked(i, j, k)]
                scores = []
                for k in keys:
                    asked = torch.cat([query[i, j, part] for query, _ in halves])
                    there = torch.cat([key[i, k, part] for _, key in halves])
                    scores.append((asked * there).sum() / math.sqrt(len(asked)))
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                for weight, k in zip(weights, keys):
                    result[i, j, part] += weight * values[i, k, part]
    return apply(output, result)


def apply(layer, x):
    return linear(x, layer.weight, layer.bias)


def two_layers(layers, x):
    return apply(layers[2], apply(layers[0], x).clamp(min=0))


def normed(norm, x):
    return layer_norm(x, (C,), norm.weight, norm.bias)
