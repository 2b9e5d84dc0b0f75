"""Any backbone under any head, tried: config lines that put one under the other, a model from them,
a training step, and a prediction.

A cell is a recipe of the model zoo whose backbone is replaced by config lines, the very lines that
a user writes: Python for lazy configs, yaml for the others.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn

from d2dense import config, model_zoo

__all__ = [
    "CLASSES",
    "KINDS",
    "Head",
    "Outcome",
    "Source",
    "build",
    "config_of",
    "faults",
    "lines",
    "try_model",
]

KINDS = ("lazy", "yaml")
CLASSES = 5
_SIZES = ((48, 64), (64, 40))  # heights and widths of the two images of a batch


@dataclass(frozen=True)
class Source:
    """A backbone: what a config says to get from it what heads take.

    Attributes:
        name: of the row.
        setup: lines by kind of config that define its body, the same for all heads.
        lines: config lines by kind of config and by what heads take: ``p2-p5``, ``p2-p6`` and
            ``p3-p7`` are levels of one width, ``maps`` are maps of any widths. ``{names}`` is
            replaced by the names of these levels or maps.
        maps: names of its maps at strides 4, 8, 16 and 32.
    """

    name: str
    setup: Mapping[str, str]
    lines: Mapping[str, Mapping[str, str]]
    maps: Sequence[str]


@dataclass(frozen=True)
class Head:
    """A detector or segmenter: a recipe, and how it names what it takes.

    Attributes:
        name: of the column.
        recipe: model-zoo name of the recipe whose backbone is replaced.
        takes: a key of :attr:`Source.lines`.
        renaming: config lines by kind that name the maps; ``{names}`` are all that are used,
            ``{names[2]}`` is one.
        small: lines by kind that make the head small, for a trial in a moment.
        first: of the maps at strides 4, 8, 16 and 32, the first that it uses.
        semantic: whether it segments, else it detects.
        idle: parameters without a gradient in a training step, as a pattern of names with the
            reason.
    """

    name: str
    recipe: str
    takes: str
    renaming: Mapping[str, str] = field(default_factory=dict)
    small: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    semantic: bool = False
    idle: Mapping[str, str] = field(default_factory=dict)

    def names(self, source: Source) -> list[str]:
        """Return the names of the maps that the backbone has to give."""
        if self.takes == "maps":
            return list(source.maps[self.first :])
        first, last = (int(name[1:]) for name in self.takes.split("-"))
        return [f"p{level}" for level in range(first, last + 1)]


def lines(source: Source, head: Head, kind: str) -> str:
    """Return the config lines that put the backbone ``source`` under ``head``; ``kind`` of config
    is "lazy" or "yaml".
    """
    names = head.names(source)
    values = {"{names}": _text(names, kind)}
    values |= {f"{{names[{index}]}}": _text(name, kind) for index, name in enumerate(names)}
    text = source.lines[kind][head.takes].rstrip() + "\n" + head.renaming.get(kind, "")
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text.strip("\n")


def _text(value: Any, kind: str) -> str:
    text = repr(value).replace("'", '"')
    return text.replace('"', "") if kind == "yaml" else text


def config_of(source: Source, head: Head, kind: str, *, imports: str = "") -> CfgNode | DictConfig:
    """Return the config of a small cell.

    Args:
        imports: Python lines that import what lazy lines use beside ``model``.
    """
    swap = lines(source, head, kind)
    setup, small = source.setup.get(kind, ""), head.small.get(kind, "")
    if kind == "lazy":
        cfg = model_zoo.get_config(head.recipe, "lazy")
        # run as the tables print them, so that what a reader copies is what was tried; they are
        # constants of composition_cells, and nothing that a user gives gets here
        exec("\n".join([imports, setup, swap, small]), {"model": cfg.model})
        return cfg
    recipe = model_zoo.get_config_file(head.recipe, "yaml")
    with tempfile.TemporaryDirectory() as folder:
        parts = {"setup": setup, "small": small, "swap": swap}
        for name, text in parts.items():
            Path(folder, f"{name}.yaml").write_text(text or "{}\n")
        bases = ", ".join([str(recipe), *(f"{name}.yaml" for name in parts)])
        path = Path(folder, "cell.yaml")
        path.write_text(f"_BASE_: [{bases}]\n")
        return config.load(path)


def build(cfg: CfgNode | DictConfig) -> nn.Module:
    """Return the model of a cell on the CPU, the same each time."""
    torch.manual_seed(0)
    return config.build_model(cfg, device="cpu")


@dataclass
class Outcome:
    """What a trial found.

    Attributes:
        parameters: of the model.
        losses: of the first step, by name.
        idle: parameters that train but got no gradient.
        moved: how many parameters the step of SGD changed.
        lengths: detections per image, or (classes, height, width) per score map.
    """

    parameters: int
    losses: dict[str, float]
    idle: list[str]
    moved: int
    lengths: list[Any]


def try_model(model: nn.Module, *, semantic: bool) -> Outcome:
    """Train a model for one step of SGD and predict.

    Raises:
        ArithmeticError: a loss or a gradient that is not finite.
    """
    batch = _batch(semantic)
    model.train()
    with EventStorage():
        losses = model(batch)
    _require_finite(losses)
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    _require_finite(gradients)
    before = {name: p.detach().clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=1e-2).step()
    moved = sum(not torch.equal(before[name], p) for name, p in trained.items())
    model.eval()
    with torch.no_grad():
        found = model(batch)
    return Outcome(
        parameters=sum(p.numel() for p in model.parameters()),
        losses={name: loss.item() for name, loss in losses.items()},
        idle=[name for name in trained if name not in gradients],
        moved=moved,
        lengths=[
            tuple(each["sem_seg"].shape) if semantic else len(each["instances"]) for each in found
        ],
    )


def faults(head: Head, outcome: Outcome) -> list[str]:
    """Return what is wrong with a trial, apart from gradients that the head says there are none of;
    nothing where the cell works.
    """
    found = [
        f"no gradient for {name}"
        for name in outcome.idle
        if not any(re.search(pattern, name) for pattern in head.idle)
    ]
    if not outcome.moved:
        found.append("a step of SGD changed nothing")
    wanted = [(CLASSES, *size) for size in _SIZES] if head.semantic else None
    if len(outcome.lengths) != len(_SIZES) or wanted not in (None, outcome.lengths):
        found.append(f"results {outcome.lengths} for images of {list(_SIZES)}")
    return found


def _require_finite(values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise ArithmeticError(f"{name} is not finite")


def _batch(semantic: bool) -> list[dict[str, Any]]:
    """Return two noise images of different sizes with objects or labels."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for height, width in _SIZES:
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        sample: dict[str, Any] = {"image": image, "height": height, "width": width}
        if semantic:
            sample["sem_seg"] = torch.randint(CLASSES, (height, width), generator=generator)
        else:
            sample["instances"] = _objects(height, width)
        batch.append(sample)
    return batch


def _objects(height: int, width: int) -> Instances:
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [10.0, 8.0, 38.0, 44.0]])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = True
    return Instances(
        (height, width),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.tensor([1, 3]),
        gt_masks=BitMasks(masks),
    )
