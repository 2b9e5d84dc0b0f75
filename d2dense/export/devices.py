"""Devices written into a TorchScript graph: find them, and let them follow the model instead."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["device_constants", "unbind_devices"]

ANCHOR = "anchor"  # the buffer of an adapter whose device the rewritten graph asks for


def device_constants(module: torch.jit.ScriptModule) -> list[str]:
    """Return the devices that are constants in ``module.forward`` and all that it calls; none is
    what one wants.
    """
    graph = module.inlined_graph  # nodes are only valid as long as their graph is held
    return [str(node.output().toIValue()) for node in _device_nodes(graph)]


def unbind_devices(module: torch.jit.ScriptModule) -> int:
    """Replace constant devices in a traced adapter by the device of its buffers, in place.

    Tracing writes down the device of the moment wherever a model asks for a tensor's device, so
    the traced model would fail elsewhere. The graph is inlined if there is anything to replace.

    Returns:
        how many constants were replaced.
    """
    if not device_constants(module):
        return 0
    graph = module._c._get_method("forward").graph
    torch._C._jit_pass_inline(graph)
    first = next(iter(graph.nodes()))
    anchor = graph.create("prim::GetAttr", [next(iter(graph.inputs()))])
    anchor.s_("name", ANCHOR)
    anchor.insertBefore(first)
    device = graph.create("prim::device", [anchor.output()])
    device.insertBefore(first)
    device.output().setType(torch._C.DeviceObjType.get())
    constants = list(_device_nodes(graph))
    for node in constants:
        node.output().replaceAllUsesWith(device.output())
        node.destroy()
    graph.lint()
    return len(constants)


def _device_nodes(graph: torch._C.Graph) -> Iterator[torch._C.Node]:
    for node in graph.findAllNodes("prim::Constant", recurse=True):
        if isinstance(node.output().type(), torch._C.DeviceObjType):
            yield node
