"""Batch norm over the batches of all processes, on any device.

PyTorch's own ``nn.SyncBatchNorm`` is one CUDA kernel; on the CPU it is an error. This one is plain
differentiable arithmetic around all-reduced sums, so it runs wherever the processes can talk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from d2dense.errors import UserError

__all__ = ["SyncBatchNorm", "has_sync_norms", "replace_sync_norms"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalise ``(N, C, ...)`` by mean and variance per channel over all processes' elements.

    Processes may hold different numbers of elements, also none; what counts is the elements of all
    together. Every process must call it, forward and backward, equally often. Where there is one
    process, or in evaluation, it is ``nn.BatchNorm2d``; parameter and buffer names always are.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        process_group: the processes that share statistics; None for all.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, ...)`` to the same shape and type; statistics are float32 at least."""
        if not (self.training and self._is_shared()):
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        others = [axis for axis in range(x.dim()) if axis != 1]
        per_channel = (1, -1) + (1,) * (x.dim() - 2)

        # the number of elements travels with the sums: it differs between processes
        number = x.new_full((1,), x.numel() // x.shape[1])
        sums = self._add_up(torch.cat([x.sum(others), number]))
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        # a second pass, since a difference of large sums of squares would lose the digits
        centred = x - mean.view(per_channel)
        variance = self._add_up(centred.square().sum(others)) / count.clamp(min=1)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count)

        scale = (variance + self.eps).rsqrt()
        result = centred * (scale if self.weight is None else scale * self.weight).view(per_channel)
        if self.bias is not None:
            result = result + self.bias.view(per_channel)
        return result.to(input.dtype)

    def _is_shared(self) -> bool:
        return (
            dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def _add_up(self, values: Tensor) -> Tensor:
        """Return the sum over the processes; its gradient is the sum of their gradients."""
        return all_reduce(values, group=self.process_group or dist.group.WORLD)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        # no element anywhere says nothing about the data
        factor = (count > 0).to(self.running_mean)
        factor *= self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(unbiased.to(self.running_var), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), found {tuple(input.shape)}")


def has_sync_norms(model: nn.Module) -> bool:
    """Whether a forward or backward pass of ``model`` itself exchanges something between processes:
    one that stops in the middle then leaves the others waiting.
    """
    kinds = (SyncBatchNorm, nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return any(
        isinstance(each, kinds) or getattr(each, "exchanges_in_forward", False)
        for each in model.modules()
    )


def replace_sync_norms(model: nn.Module) -> int:
    """Let every ``nn.SyncBatchNorm`` of ``model`` compute as :class:`SyncBatchNorm`, in place.

    The modules stay the same objects, with their parameters, buffers and hooks, so whoever refers
    to one sees the change. Call it before wrapping the model: PyTorch's wrapper for several
    processes refuses ``nn.SyncBatchNorm`` on the CPU.

    Returns:
        how many modules changed.

    Raises:
        UserError: a norm derived from ``nn.SyncBatchNorm``, whose own computation would be lost.
    """
    found = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for module in found:
        if type(module) is not nn.SyncBatchNorm:
            raise UserError(
                f"{type(module).__name__} runs on GPUs only; on the CPU use the norm BN or SyncBN "
                "(such as MODEL.RESNETS.NORM), or one process (--num-gpus 1)"
            )
    for module in found:
        # both keep their state in the attributes of nn.BatchNorm2d, plus process_group
        module.__class__ = SyncBatchNorm
    return len(found)
