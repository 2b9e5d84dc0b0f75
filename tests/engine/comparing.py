"""What runs left behind, and how it is compared."""

from __future__ import annotations

import json

import torch

from d2dense import checkpoint

EXACT = {"rtol": 0.0, "atol": 0.0}


def weights(path):
    return checkpoint.read(path)["model"]


def assert_equal(found, expected):
    """Equal weights, bit for bit."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def final(folder):
    return checkpoint.read(folder / "model_final.pth")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def losses(folder):
    """All reported losses, ``(reports, 3)``."""
    names = ("loss_first", "loss_second", "total_loss")
    return torch.tensor([[row[name] for name in names] for row in rows(folder)])


def assert_same(found, expected, tolerance, path=""):
    """Equal structure, types and order; tensors within ``tolerance``."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda m: f"{path}: {m}")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_same(found[key], value, tolerance, f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for one, two in zip(found, expected):
            assert_same(one, two, tolerance, path)
    else:
        assert found == expected, path
