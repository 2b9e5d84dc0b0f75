"""How the processes of a run share the model: what is wrapped, and how its state is gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from d2dense.errors import UserError
from d2dense.layers.sync_norm import has_sync_norms
from d2dense.solver.sharded import gathered, local_part, share_like

from .agreement import AgreedGradients
from .guard import GuardedModel
from .recompute import blocks
from .settings import RunSettings
from .unused import require_gradients

__all__ = ["FullShares", "OptimizerShares", "Replicas", "build_parallel"]

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Replicas:
    """Every process holds the whole model and optimizer state; gradients are averaged.

    Everything here is called by all processes together. State dicts are whole (not shared out), the
    same whatever the way of sharing, and complete on the main process only.
    """

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self._exchanged: list[tuple[str, nn.Parameter]] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the bare model in place before an optimizer sees its parameters."""
        return model

    def build_optimizer(self, model: nn.Module, build: BuildOptimizer) -> torch.optim.Optimizer:
        """Return the optimizer that ``build(model)`` describes."""
        return build(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what a training step calls; the bare model keeps its parameter names."""
        if comm.get_world_size() == 1:
            return GuardedModel(model)
        guarded = GuardedModel(model, replace_failed=not has_sync_norms(model))
        if not self.settings.find_unused_parameters:
            self._exchanged = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        on_gpu = torch.device(self.settings.device).type == "cuda"
        return DistributedDataParallel(
            guarded,
            device_ids=[torch.cuda.current_device()] if on_gpu else None,
            broadcast_buffers=False,
            find_unused_parameters=self.settings.find_unused_parameters,
        )

    def local_only(self, wrapped: nn.Module) -> AbstractContextManager:
        """Keep gradients of a ``with`` block in this process: they are exchanged later."""
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()

    def check_gradients(self) -> None:
        """Find parameters that got no gradient, before processes wait for each other's.

        Raises:
            UserError: there are some; names a few.
        """
        require_gradients(self._exchanged)

    def whole(self, model: nn.Module) -> AbstractContextManager:
        """Let each process run the bare model's forward on its own in a ``with`` block."""
        return nullcontext()

    def local(self, tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Yield what this process holds of ``tensors``, as plain tensors."""
        return map(local_part, tensors)

    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
        """Yield this process's gradients as plain tensors."""
        return self.local(p.grad for p in _parameters(optimizer) if p.grad is not None)

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return gathered(model.state_dict())

    def load_model(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        mine = model.state_dict()
        model.load_state_dict(
            {name: share_like(value, mine.get(name)) for name, value in state.items()}
        )

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return gathered(optimizer.state_dict())

    def load_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = dict(zip(numbers, _parameters(optimizer)))
        shares = {
            number: {
                name: share_like(value, parameters.get(number)) for name, value in entries.items()
            }
            for number, entries in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shares})


class OptimizerShares(Replicas):
    """ZeRO stage 1: each process keeps the optimizer state of some parameters, updates these, and
    sends them to the others.

    The optimizer is the one that the experiment builds. It sees the gradients of this process's
    parameters only, so it makes no state for the others; a step is the same arithmetic as without
    sharing, to the last bit. After a step the other gradients are gone.
    """

    def build_optimizer(self, model: nn.Module, build: BuildOptimizer) -> torch.optim.Optimizer:
        optimizer = build(model)
        self._owners = _balanced(_parameters(optimizer), comm.get_world_size())
        optimizer.register_step_pre_hook(self._keep_own_gradients)
        optimizer.register_step_post_hook(self._exchange_parameters)
        return optimizer

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        own = {number: _on_cpu(state["state"][number]) for number in self._own(state["state"])}
        parts = comm.gather(own)
        state["state"] = dict(sorted(chain.from_iterable(part.items() for part in parts)))
        return state

    def load_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        own = {number: state["state"][number] for number in self._own(state["state"])}
        super().load_optimizer(model, optimizer, {**state, "state": own})

    def _own(self, numbers: Iterable[int]) -> list[int]:
        # state dicts number the parameters through all groups
        rank = comm.get_rank()
        return [n for n in numbers if n < len(self._owners) and self._owners[n] == rank]

    def _keep_own_gradients(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        rank = comm.get_rank()
        for parameter, owner in zip(_parameters(optimizer), self._owners):
            if owner != rank:
                parameter.grad = None

    def _exchange_parameters(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        under_way = [
            dist.broadcast(parameter.detach(), owner, async_op=True)
            for parameter, owner in zip(_parameters(optimizer), self._owners)
        ]
        for transfer in under_way:
            transfer.wait()


class FullShares(Replicas):
    """FSDP: each process keeps a part of weights, gradients and optimizer state.

    The weights of a block come together for its forward and again for its backward; those outside
    any block, from the forward to the end of the backward; all of them for an evaluation. Each
    process builds the whole model before it is shared out.

    A step that ends in one process with an exception cannot be finished by the others: they are
    ended by whoever launched them.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        _check_shareable(model)
        with torch.no_grad():  # each process has drawn its own initial values
            for tensor in chain(model.parameters(), model.buffers()):
                dist.broadcast(tensor, 0)
        device = torch.device(self.settings.device).type
        mesh = init_device_mesh(device, (comm.get_world_size(),))
        for block in _independent_blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        return fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def wrap(self, model: nn.Module) -> nn.Module:
        return AgreedGradients(GuardedModel(model, replace_failed=False))

    @contextmanager
    def local_only(self, wrapped: AgreedGradients) -> Iterator[None]:
        root = wrapped.guarded.model
        root.set_requires_gradient_sync(False)
        wrapped.exchanging = False
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)
            wrapped.exchanging = True

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Hold all weights in every process: test sets give each its own number of batches."""
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        model.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)


def build_parallel(settings: RunSettings) -> Replicas:
    """Return the way of sharing that ``settings.sharding`` names; one process shares nothing.

    Raises:
        UserError: settings that do not go together.
    """
    if settings.sharding == "fsdp":
        for name, keys in (
            ("compile", "TRAIN.COMPILE or train.compile"),
            ("channels_last", "TRAIN.CHANNELS_LAST or train.channels_last"),
        ):
            if getattr(settings, name):
                raise UserError(
                    f"sharding fsdp does not go together with {name}; switch that off ({keys}), or "
                    "share out less with TRAIN.SHARDING zero1 or train.sharding=zero1"
                )
    if comm.get_world_size() == 1:
        return Replicas(settings)
    ways = {"none": Replicas, "zero1": OptimizerShares, "fsdp": FullShares}
    return ways[settings.sharding](settings)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _balanced(parameters: list[nn.Parameter], processes: int) -> list[int]:
    """Return the owner of each parameter, so that all own about as many elements."""
    loads, owners = [0] * processes, [0] * len(parameters)
    for index in sorted(range(len(parameters)), key=lambda each: -parameters[each].numel()):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += parameters[index].numel()
    return owners


def _on_cpu(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in entries.items()
    }


def _check_shareable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0 or not parameter.is_contiguous():
            what = "a single number" if parameter.dim() == 0 else "not contiguous in memory"
            raise UserError(
                f"sharding fsdp cannot share out the parameter {name}, which is {what}; use "
                "TRAIN.SHARDING zero1 or train.sharding=zero1"
            )


def _independent_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that share no parameter with anything outside."""
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1

    def is_independent(block: nn.Module) -> bool:
        inside: dict[nn.Parameter, int] = {}
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                inside[parameter] = inside.get(parameter, 0) + 1
        return bool(inside) and all(uses[each] == count for each, count in inside.items())

    return [block for block in blocks(model) if is_independent(block) and block is not model]
