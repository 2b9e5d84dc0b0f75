"""What each of two processes does for test_two_processes.py, all in one start."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from d2dense.layers import replace_sync_norms
from tests.projects.hfgd import tiny

SIZE = (65, 97)
IMAGES = 4
# of CAR's official means per process, of each encoder, of each normaliser
CASES = {
    "usfpn": {"out_stride": 2},
    "valid": {"loss_normalizer": "valid"},
    "official_means": {"car": {"global_means": False}},
    "masked": {"car": {"c2p_mask_ignored": True}},
    "unguided": {"hfgm": False},
    "ocr": {"encoder": "ocr"},
    "aspp": {"encoder": "aspp"},
}


def batch() -> list[dict]:
    """Four images; the two of the first process have few labels, and all classes differ."""
    generator = torch.Generator().manual_seed(5)
    targets = tiny.labels(*SIZE, images=IMAGES, seed=2)
    targets[0, 10:] = 255
    targets[1][targets[1] == 3] = 255
    return [
        {
            "image": torch.randint(0, 256, (3, *SIZE), generator=generator).to(torch.uint8),
            "sem_seg": labels,
        }
        for labels in targets
    ]


def model(case: str, norm: str) -> torch.nn.Module:
    from hfgd import CARLosses

    options = dict(CASES[case])
    car = CARLosses(**options.pop("car", {}))
    return tiny.segmenter(backbone_options={"norm": norm}, car=car, **options).double().train()


def step(wrapped, samples) -> dict:
    """Losses, gradients by name, and running statistics of one step."""
    losses = wrapped(samples)
    sum(losses.values()).backward()
    bare = getattr(wrapped, "module", wrapped)
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in bare.named_parameters()},
        "buffers": dict(bare.named_buffers()),
    }


def shared(case: str) -> dict:
    bare = model(case, "SyncBN")
    for name, module in bare.sem_seg_head.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # NARROW has the norm of one process
            parent, _, child = name.rpartition(".")
            synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
            setattr(bare.sem_seg_head.get_submodule(parent), child, synced)
    replace_sync_norms(bare)
    part = IMAGES // comm.get_world_size()
    mine = batch()[part * comm.get_rank() :][:part]
    return step(DistributedDataParallel(bare, broadcast_buffers=False), mine)


def run(args) -> None:
    found = {case: shared(case) for case in CASES}
    torch.save(found, Path(args.output_dir) / f"found{comm.get_rank()}.pth")
