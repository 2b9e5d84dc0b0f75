"""What the host would wait for if a model lay on a GPU, found on a CPU."""

from __future__ import annotations

import traceback
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

DEVICE = torch.device("cpu", 0)  # stands for the GPU; torch.device("cpu") is the host
_HOST = torch.device("cpu")
_SIZES = ("aten.nonzero", "aten._local_scalar_dense", "aten.masked_select", "aten.unique",
          "aten._unique", "aten.repeat_interleave.Tensor", "aten.equal")  # fmt: skip
_READS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")


def _tensors(tree):
    return [each for each in tree_flatten(tree)[0] if isinstance(each, torch.Tensor)]


class _Propagation(TorchDispatchMode):
    """Results of what lies on the device lie there too."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if self.waits.any_there((args, kwargs)):
            if not name.startswith("aten._local_scalar_dense"):
                self.waits.place(result)
            indices = args[1] if name.startswith("aten.index") and len(args) > 1 else ()
            masked = isinstance(indices, (list, tuple)) and any(
                isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices
            )
            if masked or name.startswith(_SIZES):
                self.waits.note(self.waits.reads, name)
        return result


class HostWaits(TorchFunctionMode):
    """Follows what lies on the device: parameters and buffers of a model, what is sent there, and
    what is computed of either.

    Attributes:
        reads: place in the code -> how often a value or a size is read from there.
        sends: place in the code -> how often something is sent there and waited for.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.reads, self.sends = Counter(), Counter()
        self._there: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again
        self._inside = False
        self._propagation = _Propagation(self)
        self.place([*model.parameters(), *model.buffers()])

    def __enter__(self):
        super().__enter__()
        self._propagation.__enter__()
        return self

    def __exit__(self, *error):
        self._propagation.__exit__(*error)
        super().__exit__(*error)

    def place(self, tree) -> None:
        for each in _tensors(tree):
            storage = each.untyped_storage()
            self._there[storage._cdata] = storage

    def any_there(self, tree) -> bool:
        return any(each.untyped_storage()._cdata in self._there for each in _tensors(tree))

    def note(self, counter: Counter, what: str) -> None:
        if self._inside and counter is self.reads:
            return  # the call that led here is noted
        ours = [
            f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if "/tests/" not in frame.filename and "/torch/" not in frame.filename
        ]
        counter[f"{what} {ours[-1] if ours else ''}"] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            if func == torch.Tensor.device.__get__ and self.any_there(args):
                return DEVICE
            return func(*args, **kwargs)
        there = self.any_there((args, kwargs))
        target = next((each for each in (*args[1:], *kwargs.values())
                       if isinstance(each, torch.device)), None)  # fmt: skip
        if name == "to" and not there and target == DEVICE:
            if not (kwargs.get("non_blocking") or True in args[2:]):
                self.note(self.sends, name)
            result = func(*args, **kwargs).clone()
            self.place(result)
            return result
        if there and (name in _READS or (name == "to" and target == _HOST)):
            self.note(self.reads, name)
            self._inside, before = True, self._inside
            try:
                result = func(*args, **kwargs)
            finally:
                self._inside = before
            if not isinstance(result, torch.Tensor):
                return result
            result = result.clone()
            self._there.pop(result.untyped_storage()._cdata, None)
            return result
        result = func(*args, **kwargs)
        if name in ("tensor", "new_tensor", "as_tensor") and (there or target == DEVICE):
            self.note(self.sends, name)
        if target == DEVICE:
            self.place(result)
        return result
