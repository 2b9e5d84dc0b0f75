"""What a checkpoint must hold for a run to go on from it.

Most parts of a checkpoint are taken over now and used later: a text in the place of a number would
end the run at some step, far from its cause. So their form is checked before anything is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import random_state

__all__ = ["check_loaded", "check_saved"]

# A form is a type, a range, "seconds", a list with the form of its entries, a tuple with one form
# for each entry, or a dict of forms; the keys ``str`` and ``int`` stand for all keys of their type,
# any other one is needed unless all are absent.
_COUNT = range(0, 2**62)
_ITERATION = range(-1, 2**62)
_SECONDS = "seconds"
_LONGEST = 1e9  # seconds, 30 years
_FORMS = {
    "iteration": _ITERATION,
    "skipped_steps": _COUNT,
    "scheduler": {"iteration": _ITERATION, "base_lrs": [float]},
    "scaler": {str: float},
    "optimizer": {"state": {int: dict}, "param_groups": [{"params": [int]}]},
    "random": [{"python": [object], "numpy": [object], "torch": torch.Tensor}],
    "progress": {
        "seed": range(0, 2**63),
        "world_size": range(1, 2**31),
        "total_batch_size": _COUNT,
        "accumulation_steps": range(1, 2**31),
        "images": _COUNT,
    },
    "loss_normalizers": [{str: float}],
    "ema": {"updates": _COUNT, "weights": {str: torch.Tensor}},
    "hooks": {
        "StepRecord": {
            "loss_names": [str],
            "last_report": _ITERATION,
            "recent": {str: {"smoothed": bool, "values": [(float, _ITERATION)]}},
            "steps": _COUNT,
            "images": _COUNT,
            "data_seconds": _SECONDS,
            "earlier_seconds": _SECONDS,
        },
        "PeriodicEvaluation": {
            "last_done": _COUNT,
            "goal": str,
            "best": {"value": float, "iteration": _ITERATION},
            "without_best": _COUNT,
        },
    },
}
# No other keys here, since they become attributes.
_CLOSED = ("hooks.StepRecord",)
# Hooks may be added and left out.
_OPEN = ("hooks",)


def check_saved(state: Mapping[str, Any], model: nn.Module) -> None:
    """Check the content of a checkpoint before it is taken over by ``model`` and its optimizer.

    Raises:
        ValueError: naming the first part that is not what it should be.
    """
    for name, form in _FORMS.items():
        if name in state:
            _check(state[name], form, name)
    _check_average(state)
    if not any(tensor.is_complex() for tensor in model.state_dict().values()):
        for name in ("model", "train_model", "ema", "optimizer"):
            _check_real(state.get(name), name)
    if "random" in state:
        with random_state.isolated():
            for each in state["random"]:
                random_state.restore_process({k: v for k, v in each.items() if k != "cuda"})


def _check(value: Any, form: Any, name: str) -> None:
    if isinstance(form, range):
        if type(value) is not int or value not in form:
            raise ValueError(f"{name} is {value!r}, expected a whole number from {form.start}")
    elif form == _SECONDS:
        if type(value) not in (int, float) or not 0 <= value < _LONGEST:
            raise ValueError(f"{name} is {value!r:.50}, expected seconds")
    elif form is float:
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
            raise _wrong(name, value, "a number")
    elif isinstance(form, type):
        if not isinstance(value, form):
            raise _wrong(name, value, f"a {form.__name__}")
    elif isinstance(form, Mapping):
        _check_keys(value, form, name)
    else:
        if not isinstance(value, (list, tuple)):
            raise _wrong(name, value, "a list")
        if isinstance(form, tuple) and len(value) != len(form):
            raise ValueError(f"{name} has {len(value)} entries, expected {len(form)}")
        forms = form if isinstance(form, tuple) else form * len(value)
        for index, (each, its_form) in enumerate(zip(value, forms)):
            _check(each, its_form, f"{name}.{index}")


def _check_keys(value: Any, form: Mapping, name: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "named parts")
    missing = [key for key in form if not isinstance(key, type) and key not in value]
    if missing and value and name not in _OPEN:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    if name in _CLOSED and value.keys() - form.keys():
        raise ValueError(f"{name} has the parts {', '.join(map(str, value))}")
    for key, each in value.items():
        if not isinstance(key, int if int in form else str):
            raise _wrong(f"the name of a part of {name}", key, "another kind")
        its_form = form.get(key, form.get(type(key)))
        if its_form is not None:
            _check(each, its_form, f"{name}.{key}")


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is a {type(value).__name__}, expected {expected}")


def _check_average(state: Mapping[str, Any]) -> None:
    """Compare the shapes of averaged weights, which copying would stretch to those of the model."""
    own = state.get("model")
    if "ema" not in state or not isinstance(own, Mapping):
        return
    for name, value in state["ema"].get("weights", {}).items():
        if name in own and value.shape != own[name].shape:
            raise ValueError(f"the average of {name} has shape {tuple(value.shape)}")


def _check_real(value: Any, name: str) -> None:
    """Refuse complex tensors: taken over, they would lose their imaginary parts."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_real(each, f"{name}.{key}")
    elif isinstance(value, torch.Tensor) and value.is_complex():
        raise ValueError(f"{name} has complex values")


def check_loaded(optimizer: torch.optim.Optimizer) -> None:
    """Check the state of an optimizer that has just been loaded; its own loading does not.

    Raises:
        ValueError: what a step would stumble over.
    """
    names = None
    for parameter, entries in optimizer.state.items():
        if not entries:
            continue
        if names is not None and entries.keys() != names:
            raise ValueError("optimizer.state has not the same parts for every parameter")
        names = entries.keys()
        for name, value in entries.items():
            if name == "step":
                fits = type(value) in (int, float) or getattr(value, "shape", None) == ()
            else:
                fits = value is None or getattr(value, "shape", None) == parameter.shape
            if not fits:
                raise ValueError(f"optimizer.state has a {name} that does not fit its parameter")
