"""FSCascade against Detectron2's own CascadeROIHeads on one R50-FPN: time, MACs and memory as
ratios.

Both get the same proposals (512 sampled in training, 1000 in inference), so that they do the same
work. With sharing off, the time ratio should stay at 1; with sharing on, at or below the MAC ratio.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2dense import benchmark, config
from d2dense.errors import ToolParser, one_or_more, run_tool

CONFIG = Path(__file__).parents[1] / "configs" / "fscascade_r50_fpn_1x.yaml"
BASELINE = "detectron2 CascadeROIHeads"
OFF = ["MODEL.FSCASCADE.CFS=False", "MODEL.FSCASCADE.LFS=False"]
VARIANTS = {
    BASELINE: ["MODEL.ROI_HEADS.NAME=CascadeROIHeads"],
    # Detectron2 averages the stages' scores at test time
    "sharing off": [*OFF, "MODEL.FSCASCADE.TEST_SCORES=ensemble_own_rois"],
    "CFS": [OFF[1]],
    "LFS, recompute": [OFF[0]],
    "CFS + LFS, recompute": [],
    "CFS + LFS, cached": ["MODEL.FSCASCADE.LFS_MODE=cached"],
}
# The same sampled boxes as input of both, no first-stage randomness in the comparison.
PRECOMPUTED = ["MODEL.PROPOSAL_GENERATOR.NAME=PrecomputedProposals", "MODEL.LOAD_PROPOSALS=True"]


def build(overrides: list[str], device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = config.build_model(config.load(CONFIG, [*PRECOMPUTED, *overrides]), device=device)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # the residual sums of an untrained net explode otherwise, and the boxes with them
            module.weight.fill_(0.4)
    return model


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return xyxy boxes (count, 4) with sides from 16 pixels to half of the image."""
    scale = torch.tensor([width, height], dtype=torch.float32)
    size = 16 + torch.rand(count, 2, generator=generator) * (scale / 2 - 16)
    corner = torch.rand(count, 2, generator=generator) * (scale - size)
    return torch.cat([corner, corner + size], dim=1)


def make_batch(height: int, width: int, proposals: int, device: str) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    target, proposed = Instances((height, width)), Instances((height, width))
    target.gt_boxes = Boxes(random_boxes(8, height, width, generator))
    target.gt_classes = torch.arange(8)
    proposed.proposal_boxes = Boxes(random_boxes(proposals, height, width, generator))
    proposed.objectness_logits = torch.zeros(proposals)
    instances = {"instances": target.to(device), "proposals": proposed.to(device)}
    return [{"image": image.to(device), "height": height, "width": width, **instances}]


def training_step(model, batch):
    model.train()

    def step():
        model.zero_grad(set_to_none=True)
        with EventStorage():  # detectron2's heads log into it
            sum(model(batch).values()).backward()

    return step


def inference(model, batch):
    model.eval()

    @torch.no_grad()
    def call():
        return model(batch)

    return call


def measure(mode: str, args: argparse.Namespace) -> list[dict]:
    """Return one row per variant for ``train`` or ``inference``."""
    height, width = args.size
    batch = make_batch(height, width, 2000 if mode == "train" else 1000, args.device)
    make = training_step if mode == "train" else inference
    calls = {name: make(build(items, args.device), batch) for name, items in VARIANTS.items()}
    rows = benchmark.compare(calls, baseline=BASELINE, rounds=args.rounds, label="heads")
    return [{"mode": mode, **row} for row in rows]


def main(argv=None) -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=2, type=one_or_more, default=[320, 480], metavar=("H", "W"))
    parser.add_argument("--rounds", type=one_or_more, default=7)
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    height, width = args.size
    report = benchmark.write_report(
        args.output / f"fscascade_{args.device}",
        title="FSCascade against Detectron2's CascadeROIHeads, R50-FPN",
        command=f"make bench-projects  # {Path(__file__).name}, {args.rounds} rounds, in turns",
        rows=[row for mode in ("train", "inference") for row in measure(mode, args)],
        notes=[
            f"One {height} x {width} image, float32. train: forward and backward, 512 sampled "
            "regions, stem and res2 frozen. inference: 1000 proposals.",
            "Ratios are to the first row, medians over rounds. GMAC counts convolutions and matrix "
            "products, backward included in training.",
            "peak MiB: memory on top of the model; on the CPU of a forked single-thread process.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))
