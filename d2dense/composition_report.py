"""The table of what goes together: every cell of the composition matrix tried, the config lines
behind it, and the recipes that combine papers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2dense import config, costs, model_zoo
from d2dense.benchmark import write_report
from d2dense.composition_cells import IMPORTS
from d2dense.composition_trial import (
    KINDS,
    Head,
    Outcome,
    Source,
    build,
    config_of,
    faults,
    lines,
    try_model,
)
from d2dense.config.text import parse_yaml

__all__ = [
    "RECIPES",
    "TABLES",
    "WORKS",
    "known_recipes",
    "pairs",
    "recipe_row",
    "try_cell",
    "write",
]

WORKS = "works"
TABLES = {
    "cells": "What works (lazy / yaml)",
    "sizes": "Parameters of the small cells (million)",
    "lines": "Config lines: the backbone",
    "names": "Config lines: the head",
    "recipes": "Recipes that combine papers, at full size",
}
# model-zoo name -> what it combines, and the height and width of the image that costs are for
RECIPES: dict[str, tuple[str, tuple[int, int]]] = {
    "FSCascade/fscascade_cednet_next_t_3x": ("CEDNet + FSCascade", (800, 1280)),
    "FSCascade/fscascade_mask_cednet_next_t_3x": (
        "CEDNet + Cascade Mask R-CNN with FSCascade",
        (800, 1280),
    ),
    "CoDETR/co_dino_5scale_cednet_next_t_1x": ("CEDNet + Co-DINO", (800, 1280)),
    "HFGD/hfgd_cednet_next_t_os4_ade20k": ("CEDNet + HFGD", (512, 512)),
    "HFGD/hfgd_convnext_l_os4_pascal_context": ("ConvNeXt-L of timm + HFGD", (512, 512)),
}
_TAKES = {
    "p2-p5": "levels p2 to p5 of one width",
    "p2-p6": "levels p2 to p6 of one width",
    "p3-p7": "levels p3 to p7 of one width",
    "maps": "maps of any widths",
}
_PLAIN = str.maketrans("", "", "' ")  # no quotes and no spaces inside a value
_NOTES = (
    "A cell is the recipe of the table of heads, whose backbone is replaced by the lines of the "
    "table of backbones, made small. It works if both kinds of config build the same parameters, "
    "all losses of a training step are finite, every parameter that trains gets a finite gradient, "
    "a step of SGD moves the weights, and inference returns a result for each image.",
    "Lazy lines follow the imports of these names: "
    + "; ".join(line for line in IMPORTS.splitlines() if line)
    + ". `trunk` and `vit` are nodes of `CEDNetTrunk`, and of `EVA02ViT` or `ViTDet`, with their "
    "sizes.",
    "`test_convnext` is timm's smallest ConvNeXt; any model that has feature maps in timm can take "
    "its place.",
    "params and GMACs of recipes: of what an image of that size goes through in inference; "
    "two-stage detectors see 1000 proposals and 100 masks. None of them has been trained here.",
)


def try_cell(source: Source, head: Head) -> tuple[str, dict[str, Outcome]]:
    """Try a cell in both kinds; return ``works / works``, or what is wrong, and the outcomes."""
    found, outcomes, shapes = [], {}, []
    for kind in KINDS:
        try:
            model = build(config_of(source, head, kind, imports=IMPORTS))
            outcomes[kind] = try_model(model, semantic=head.semantic)
        except Exception as error:  # a cell that fails is a result of the table
            found.append(f"{type(error).__name__}: {error}")
            continue
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
        found.append("; ".join(faults(head, outcomes[kind])) or WORKS)
    if len(shapes) == len(KINDS) and shapes[0] != shapes[1]:
        found[-1] = "another model than the lazy one"
    return " / ".join(found), outcomes


def known_recipes(path: Path) -> list[dict[str, Any]]:
    """Return the rows of recipes of a written table, none where there is no such table."""
    path = path.with_suffix(".json")
    return json.loads(path.read_text())["rows"][TABLES["recipes"]] if path.is_file() else []


def recipe_row(name: str) -> dict[str, Any]:
    """Return what a recipe combines and costs; its products are not computed."""
    from d2dense.model_table import hollow, parameters  # it needs all exporters

    what, size = RECIPES[name]
    model = config.build_model(model_zoo.get_config(name), device="cpu")
    with hollow():
        macs = costs.analyze(model, tasks=["flops"], input_size=size)["macs"]
    return {
        "model": name,
        "combines": what,
        "params M": round(parameters(model)[0] / 1e6, 2),
        "GMACs": round(macs / 1e9, 1),
        "at": f"{size[0]} x {size[1]}",
        "kinds": ", ".join(kind for kind in KINDS if name in model_zoo.list_models(kind)),
    }


def write(
    path: Path,
    *,
    command: str,
    heads: Sequence[Head],
    sources: Sequence[Source],
    known: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Try all cells, write ``path``.json and ``path``.md, and return the Markdown.

    Args:
        known: rows of recipes that are not counted again.
    """
    recipes = {row["model"]: dict(row) for row in known}
    cells: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    notes = list(_NOTES)
    for head in heads:
        results, counts = {}, {}
        for source in sources:
            results[source.name], outcomes = try_cell(source, head)
            counts[source.name] = _millions(outcomes)
        cells.append({"head": head.name, **results})
        sizes.append({"head": head.name, **counts})
        notes += [
            f"{head.name}: no gradient for parameters like `{pattern}`: {why}."
            for pattern, why in head.idle.items()
        ]
    rows = {
        TABLES["cells"]: cells,
        TABLES["sizes"]: sizes,
        TABLES["lines"]: list(_line_rows(sources, heads)),
        TABLES["names"]: [_head_row(head, sources[0]) for head in heads],
        TABLES["recipes"]: [recipes.get(name) or recipe_row(name) for name in RECIPES],
    }
    return write_report(path, title="What goes together", command=command, rows=rows, notes=notes)


def _millions(outcomes: Mapping[str, Outcome]) -> float | None:
    counts = [outcome.parameters for outcome in outcomes.values()]
    return round(counts[0] / 1e6, 2) if counts else None


def _line_rows(sources: Sequence[Source], heads: Sequence[Head]) -> Iterator[dict[str, str]]:
    """Yield the lines of each backbone, once for all that heads take alike."""
    for source in sources:
        seen: dict[tuple[str, str], list[str]] = {}
        for takes in dict.fromkeys(head.takes for head in heads):
            plain = Head(name="", recipe="", takes=takes)
            pair = lines(source, plain, "lazy"), lines(source, plain, "yaml")
            seen.setdefault(pair, []).append(_TAKES[takes])
        for (lazy, yaml), taken in seen.items():
            yield {
                "backbone": source.name,
                "gives": "; ".join(taken),
                "lazy": _code(lazy.replace("\n", "; ")),
                "yaml": _code(pairs(yaml)),
            }


def _head_row(head: Head, source: Source) -> dict[str, str]:
    """Return what a head takes, and how it names it on maps of a ResNet."""
    named = {}
    for kind in KINDS:
        plain = Source(name="", setup={}, lines={kind: {head.takes: "MODEL:\n"}}, maps=source.maps)
        text = lines(plain, head, kind).removeprefix("MODEL:").strip("\n")
        if text:
            text = pairs(f"MODEL:\n{text}") if kind == "yaml" else text.replace("\n", "; ")
        named[kind] = _code(text) if text else "-"
    return {"head": head.name, "recipe": head.recipe, "takes": _TAKES[head.takes], **named}


def pairs(text: str) -> str:
    """Return yaml lines as ``KEY VALUE KEY VALUE``, the way of the command line."""
    return " ".join(_pairs(parse_yaml(text), ""))


def _pairs(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} {str(value).translate(_PLAIN)}"


def _code(text: str) -> str:
    return f"`{text}`"
