"""TorchScript of an adapter, by tracing and by scripting."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torchvision.ops.boxes
from detectron2.export import scripting_with_instances
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling.box_regression import Box2BoxTransform
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import SyncBatchNorm

from .adapters import Adapter, frozen_adapter
from .devices import device_constants, unbind_devices
from .support import check_supported

__all__ = ["METHODS", "quiet", "to_torchscript"]

logger = logging.getLogger(__name__)


def to_torchscript(
    model: nn.Module, image: Tensor, *, method: str = "trace"
) -> torch.jit.ScriptModule:
    """Return ``model`` as TorchScript that needs torch and torchvision alone.

    The model itself stays as it is: a copy in evaluation mode is converted, on the model's device,
    without what only training needs.

    Args:
        image: ``(C, H, W)`` in [0, 255], what is traced; scripting runs nothing and ignores it.
        method: ``trace`` records one run (every supported model); ``script`` compiles the code
            (R-CNNs, RetinaNet, segmenters and classifiers, see :mod:`.support`).

    Raises:
        UserError: an unknown method, a model without adapter, or one that the method cannot do.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r}, expected one of {', '.join(METHODS)}")
    check_supported(model, "torchscript", method)
    adapter = frozen_adapter(model)
    with torch.no_grad(), quiet():
        module = METHODS[method](adapter, image)
    left = device_constants(module)
    if left:
        raise RuntimeError(f"the exported graph is bound to {', '.join(sorted(set(left)))}")
    return module


def _trace(adapter: Adapter, image: Tensor) -> torch.jit.ScriptModule:
    # a script inside a trace decides by the number of boxes in each run, as eager code does
    nms = torch.jit.script(torchvision.ops.boxes.batched_nms)
    _compile_windows(adapter)
    with patch_builtin_len(), mock.patch.object(torchvision.ops.boxes, "batched_nms", nms):
        module = torch.jit.trace(adapter, (image,), check_trace=False)
    replaced = unbind_devices(module)
    logger.debug("replaced %d constant devices", replaced)
    return module


def _compile_windows(model: nn.Module) -> None:
    """Compile the blocks of timm's Swin models, in place: a trace would keep the numbers of windows
    of the image that it saw.
    """
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (SwinTransformerBlock, SwinTransformerV2Block):
                setattr(module, name, torch.jit.script(child))


def _script(adapter: Adapter, image: Tensor) -> torch.jit.ScriptModule:
    del image
    _make_plain(adapter)
    _unsynchronise(adapter)
    try:
        return scripting_with_instances(adapter, adapter.instance_fields)
    except (RuntimeError, TypeError, AttributeError) as error:
        logger.debug("scripting failed", exc_info=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{_parts(adapter.model)} cannot be scripted ({(lines or [type(error).__name__])[0]}); "
            "use --method trace"
        ) from error


def _make_plain(model: nn.Module) -> None:
    """Turn what a lazy config left in attributes into lists, tuples and dicts, and sets into lists,
    in place.

    Scripting types attributes by their values and does not know omegaconf's containers, nor sets.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (ListConfig, DictConfig)):
                setattr(module, name, OmegaConf.to_container(value))
            elif isinstance(value, set) and not name.startswith("_non_persistent"):
                setattr(module, name, sorted(value))
            elif isinstance(value, Box2BoxTransform) and isinstance(value.weights, ListConfig):
                value.weights = tuple(value.weights)


def _unsynchronise(model: nn.Module) -> None:
    """Turn synchronised batch norms into plain ones, in place: in evaluation they are the same, and
    what they ask of other processes cannot be scripted.
    """
    for module in model.modules():
        for name, norm in list(module.named_children()):
            if isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)):
                plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, affine=norm.affine)
                plain.to(norm.running_mean).load_state_dict(norm.state_dict())
                setattr(module, name, plain.requires_grad_(False).eval())


def _parts(model: nn.Module) -> str:
    heads = getattr(model, "roi_heads", None)
    return type(model).__name__ + ("" if heads is None else f" with {type(heads).__name__}")


METHODS: dict[str, Callable[[Adapter, Tensor], torch.jit.ScriptModule]] = {
    "trace": _trace,
    "script": _script,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the tracer's warnings and Detectron2's deprecated calls; the check of the result is what
    tells whether they matter.
    """
    noisy = logging.getLogger("torch.fx._symbolic_trace")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(noisy.setLevel, noisy.level)
        noisy.setLevel(logging.ERROR)
        yield
