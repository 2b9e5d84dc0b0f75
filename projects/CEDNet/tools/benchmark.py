"""CEDNet against timm's ConvNeXt-T: time and memory per multiply-accumulate.

Both are built of the same operations, so a CEDNet without waste needs as much time and training
memory per multiply-accumulate as the widely used implementation of the other: a ratio near 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cednet import official
from d2dense import benchmark
from d2dense.errors import ToolParser, one_or_more, run_tool

BASELINE = "timm convnext_tiny"
_OWN = "CEDNet-NeXt-T"
_DROP_PATH = 0.2  # that of the detection recipes, for both


def _baseline() -> nn.Module:
    return timm.create_model("convnext_tiny", features_only=True, drop_path_rate=_DROP_PATH)


def _cednet(variant: str) -> nn.Module:
    return official.build(variant).backbone


# name -> what builds the network, how it runs
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    BASELINE: (_baseline, "eager"),
    f"{_OWN}, C2-C5": (partial(_cednet, "det_mask2former_next_tiny"), "eager"),
    f"{_OWN}, p3-p7": (partial(_cednet, "det_retina_next_tiny"), "eager"),
}
COMPILED = {
    f"{name}, {how}": (NETWORKS[name][0], how)
    for how in ("torch.compile", "TorchScript")
    for name in (BASELINE, f"{_OWN}, C2-C5")
}
OTHERS = {
    f"CEDNet-{title}, p3-p7": (partial(_cednet, f"det_retina_{trunk}"), "eager")
    for title, trunk in {
        "NeXt-T U-Net": "next_tiny_unet",
        "NeXt-T Hourglass": "next_tiny_hourglass",
        "NeXt-T FPN-variant": "next_tiny_fpnvariant",
        "R50-T": "res50",
        "Swin-T": "swin_tiny",
        "CSwin-T": "cswin_tiny",
    }.items()
}


def _maps(outputs: Any) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def training_step(model: nn.Module, images: Tensor, how: str) -> Callable[[], None]:
    """Return forward, backward and AdamW's step; no gradient is left between two calls."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run = torch.compile(model, fullgraph=True) if how == "torch.compile" else model

    def step():
        # gradients have the memory order of the maps, as those from a head have
        sum(each.square().mean() for each in _maps(run(images))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, images: Tensor, how: str) -> Callable[[], Any]:
    """Return the forward pass without gradients."""
    run = model.eval()
    if how == "torch.compile":
        run = torch.compile(model, fullgraph=True)
    elif how == "TorchScript":
        with torch.no_grad():
            run = torch.jit.trace(model, images, strict=False, check_trace=False)

    @torch.no_grad()
    def call():
        return run(images)

    return call


def forward_macs(build: Callable[[], nn.Module], size: tuple[int, int, int, int]) -> int:
    """Count one forward pass on the meta device, where no device's own ways of computing a layer
    add to it.
    """
    with torch.device("meta"):
        model, images = build().eval(), torch.empty(size)
    with torch.no_grad():
        return benchmark.macs_of(lambda: model(images))


def measure(networks: dict, mode: str, args: argparse.Namespace, rounds: int) -> list[dict]:
    """Return one row per network for ``training`` or ``inference``."""
    make = training_step if mode == "training" else inference
    size = (args.batch, 3, *args.size)
    images = torch.randn(size, device=args.device).contiguous(memory_format=torch.channels_last)
    calls, macs = {}, {}
    for name, (build, how) in networks.items():
        if how == "TorchScript" and mode == "training":
            continue
        torch.manual_seed(0)
        model = build().to(args.device, memory_format=torch.channels_last)
        calls[name] = make(model, images, how)
        macs[name] = forward_macs(build, size)
    # compiled code keeps the number of threads of its first run, which no forked process has
    forks = not torch.cuda.is_available()
    compiles = any(how != "eager" for _, how in networks.values())
    without_memory = list(calls) if forks and compiles else []
    rows = benchmark.compare(
        calls,
        baseline=BASELINE,
        rounds=rounds,
        label="network",
        macs=macs,
        without_memory=without_memory,
    )
    return [{"mode": mode, **row} for row in rows]


def main(argv=None) -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=2, type=one_or_more, default=[512, 512], metavar=("H", "W"))
    parser.add_argument("--batch", type=one_or_more, default=1, help="images per call")
    parser.add_argument(
        "--rounds", type=one_or_more, default=9, help="a third of it for the second table"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    compiled = {k: v for k, v in COMPILED.items() if not args.no_compile or v[1] == "TorchScript"}
    few = max(args.rounds // 3, 1)
    groups: dict[str, tuple[dict, int]] = {
        "CEDNet-NeXt-T": (NETWORKS, args.rounds),
        "Styles and token mixers": ({BASELINE: NETWORKS[BASELINE], **OTHERS}, few),
        # last: a process that has compiled something may not measure memory any more
        "Compiled": ({**dict(list(NETWORKS.items())[:2]), **compiled}, args.rounds),
    }
    tables = {
        heading: [row for mode in ("inference", "training") for row in measure(nets, mode, args, n)]
        for heading, (nets, n) in groups.items()
    }
    height, width = args.size
    report = benchmark.write_report(
        args.output / f"cednet_{args.device}",
        title="CEDNet against timm's ConvNeXt-T",
        command=f"make bench-projects  # {Path(__file__).name}, {args.rounds} rounds, in turns",
        rows=tables,
        notes=[
            f"Batch {args.batch}, 3 x {height} x {width}, float32, channels_last. inference: one "
            "forward pass. training: forward, backward and a step of fused AdamW, stochastic "
            f"depth as in the detection recipes ({BASELINE}: {_DROP_PATH}).",
            f"Ratios are to {BASELINE} with its four feature maps, not compiled; those of times "
            "are medians over rounds. GMAC counts convolutions and matrix products of the forward "
            "pass, in training too; attention within windows is in it.",
            "peak MiB: memory on top of the model and the optimizer; on the CPU of a forked "
            "single-thread process, where compiled code cannot run.",
            "Compiled: torch.compile(fullgraph=True), the time of compiling left out.",
            "TorchScript: traced. Its long-range blocks use the plain dilated convolution, which "
            "fits every device and is slower than ours on the CPU.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))
