"""Training statistics of cascade stages, written to the event storage beside the losses."""

from __future__ import annotations

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from .regions import Regions

__all__ = ["log_statistics"]

PERIOD = 20  # iterations between two readings of accuracies from the device


def log_statistics(logits: list[Tensor], stages: list[Regions]) -> None:
    """Write the number of foreground and background regions per image of each stage, and, every 20
    iterations, accuracies.

    Region numbers are known on the host; the accuracies of all stages are read with one
    synchronisation.

    Args:
        logits: per stage ``(R, K + 1)``
        stages: the labelled regions that they belong to
    """
    if not has_event_storage():
        return
    storage = get_event_storage()
    for k, regions in enumerate(stages):
        num_foreground = len(regions.foreground)
        num_background = len(regions.classes) - num_foreground
        prefix = f"stage{k}/roi_head"
        storage.put_scalar(f"{prefix}/num_fg_samples", num_foreground / regions.num_images)
        storage.put_scalar(f"{prefix}/num_bg_samples", num_background / regions.num_images)
    if storage.iter % PERIOD == 0:
        _log_accuracies(storage, logits, stages)


@torch.no_grad()
def _log_accuracies(storage, logits: list[Tensor], stages: list[Regions]) -> None:
    counts = []
    for stage_logits, regions in zip(logits, stages):
        predicted, foreground = stage_logits.argmax(dim=1), regions.foreground
        correct = predicted == regions.classes
        missed = predicted[foreground] == stage_logits.shape[1] - 1
        counts.append(torch.stack([correct.sum(), correct[foreground].sum(), missed.sum()]))
    for k, (correct, correct_foreground, missed) in enumerate(torch.stack(counts).tolist()):
        prefix = f"stage{k}/fast_rcnn"
        num_regions, num_foreground = len(stages[k].classes), len(stages[k].foreground)
        if num_regions > 0:
            storage.put_scalar(f"{prefix}/cls_accuracy", correct / num_regions)
        if num_foreground > 0:
            storage.put_scalar(f"{prefix}/fg_cls_accuracy", correct_foreground / num_foreground)
            storage.put_scalar(f"{prefix}/false_negative", missed / num_foreground)
