"""``torch.export`` of an adapter: one graph for images of any height and width."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive._package import load_pt2
from torch.fx import GraphModule

from .adapters import Adapter, largest_side
from .archive import refuse_code
from .symbolic import symbolic_sizes

__all__ = [
    "LEAST_SIDE",
    "open_exported_program",
    "record",
    "save_exported_program",
]

LEAST_SIDE = 33  # pixels; smaller images are refused by the file

# Height and width that stand for all others while the graph is recorded: every map has more than
# one pixel, and no two sides of any level are equal, for these would be taken to be always so.
# Filled up to a multiple of 32 they are one of 128 too: PyTorch solves what follows for coarser
# levels by what is divisible here, and gives up otherwise.
_STANDING_FOR_ALL = (631, 1009)

# PyTorch keeps apart tensors with a side of 1 wherever it decides between a view and a copy. What
# it records then is right for a side of 1 too, as it assumes itself for sizes that depend on data.
_NOT_ONE = re.compile(r"expression Ne\(.*, [01]\) on node")

# What nodes remember of the source: lines and paths of the machine that exported.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")


def record(adapter: Adapter, image: Tensor) -> ExportedProgram:
    """Return the adapter as a program that takes float32 images ``(C, H, W)`` in [0, 255] with
    sides from :data:`LEAST_SIDE` to what :func:`~d2dense.export.adapters.largest_side` says.

    Args:
        adapter: in evaluation mode, with parameters that need no gradient.
        image: ``(C, h, w)``, of which only the number of channels and the device count.
    """
    largest = largest_side(adapter.model)
    sides = {
        axis + 1: Dim(name, min=LEAST_SIDE, max=largest)
        for axis, name in enumerate(("height", "width"))
    }
    size = [
        side if largest is None else min(side, largest - k)
        for k, side in enumerate(_STANDING_FOR_ALL)
    ]
    example = torch.zeros(image.shape[0], *size, device=image.device)
    with torch.no_grad(), symbolic_sizes():
        program = torch.export.export(
            adapter,
            (example,),
            dynamic_shapes=(sides,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _allow_sides_of_one(program)
    return program


def save_exported_program(adapter: Adapter, image: Tensor, path: Path) -> None:
    """Write ``model.pt2``."""
    program = record(adapter, image)
    program.example_inputs = None  # megabytes of zeros, in a pickle
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            for name in _ORIGINS:
                node.meta.pop(name, None)
    torch.export.save(program, path)


def open_exported_program(
    path: Path, device: str | torch.device
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function of a float32 image ``(C, H, W)`` that gives the file's outputs.

    A program is recorded on the CPU, with the device written into it; for another one it is
    rewritten here, as ``torch.export.passes.move_to_device_pass`` does.

    Raises:
        UserError: the file may hold code, see :func:`~d2dense.export.archive.refuse_code`.
    """
    refuse_code(path)
    # torch.export.load would try older formats, with pickles, where this fails
    program = load_pt2(str(path)).exported_programs["model"]
    if torch.device(device).type != "cpu":
        program = move_to_device_pass(program, str(device))
    return program.module()


def _allow_sides_of_one(program: ExportedProgram) -> None:
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_scalar.default
    ):
        if _NOT_ONE.search(str(node.args[1])):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
