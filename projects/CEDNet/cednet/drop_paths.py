"""How many blocks a style puts where, and the stochastic depth of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["StagePlan", "drop_path_rates", "plan_stages"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Numbers of blocks of a stage.

    Attributes:
        encoder: at C3, C4, C5.
        decoder: at C4, C3.
        nominal: all blocks of the stage, also those of a decoder that it does not have.
    """

    encoder: tuple[int, int, int]
    decoder: tuple[int, int]
    nominal: int


def plan_stages(
    blocks: Sequence[Sequence[int]], *, split: bool, last_decoder: bool
) -> list[StagePlan]:
    """Return the plan of every stage.

    Args:
        blocks: ``(b0, b1, b2)`` of every stage.
        split: half of the blocks at C3 and C4 belong to the decoder (the encoder's half is rounded
            down).
        last_decoder: whether the last stage has a decoder.
    """
    plans = []
    for k, (b0, b1, b2) in enumerate(blocks):
        encoder, decoder = (b0, b1, b2), (0, 0)
        if split:
            encoder, decoder = (b0 // 2, b1 // 2, b2), (b1 - b1 // 2, b0 - b0 // 2)
        if k == len(blocks) - 1 and not last_decoder:
            decoder = (0, 0)
        plans.append(StagePlan(encoder=encoder, decoder=decoder, nominal=b0 + b1 + b2))
    return plans


def drop_path_rates(
    plans: Sequence[StagePlan], *, first: int, rate: float, official: bool
) -> tuple[list[float], list[tuple[list[list[float]], list[list[float]]]]]:
    """Return the rates of the ``first`` blocks before all stages, and of every stage those of its
    encoder (C3, C4, C5) and decoder (C4, C3).

    They grow linearly in forward order, from 0 for the first block to ``rate`` for the last.

    Args:
        official: the official code's slips. Slots are kept for the decoder that the last stage does
            not have, and a decoder's blocks at C3 start again at the rate of its first block at C4.
    """
    sizes = [sum(plan.encoder) + sum(plan.decoder) for plan in plans]
    if official:
        sizes = [plan.nominal for plan in plans]
    last = max(first + sum(sizes) - 1, 1)
    slots = [rate * i / last for i in range(first + sum(sizes))]
    stages, start = [], first
    for plan, size in zip(plans, sizes):
        encoder, end = _sliced(slots, start, plan.encoder)
        if official:
            decoder = [slots[end : end + count] for count in plan.decoder]
        else:
            decoder, _ = _sliced(slots, end, plan.decoder)
        stages.append((encoder, decoder))
        start += size
    return slots[:first], stages


def _sliced(
    slots: Sequence[float], start: int, counts: Sequence[int]
) -> tuple[list[list[float]], int]:
    parts = []
    for count in counts:
        parts.append(list(slots[start : start + count]))
        start += count
    return parts, start
