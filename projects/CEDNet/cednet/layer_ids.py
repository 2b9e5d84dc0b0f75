"""Which layer a parameter of the trunk belongs to, for learning rates that decay by layer."""

from __future__ import annotations

import re

__all__ = ["LAYER_RULES", "layer_id"]

LAYER_RULES = ("stage", "half_stage")

_STAGE = re.compile(r"stages\.(\d+)\.(.+)")
# The half of a stage that counts as its first: C3, the step to C4, and C4's first four blocks.
_FIRST_HALF = re.compile(r"encoder\.(levels\.0\.|down\.0\.|levels\.1\.[0-3]\.)")


def layer_id(name: str, rule: str) -> int | None:
    """Return the layer of the trunk's parameter ``name``: 0 for the stem, 1 for the blocks at
    stride 4; then one per stage (``stage``) or two (``half_stage``). None for anything else.
    """
    if name.startswith("stem."):
        return 0
    if name.startswith(("first.", "down.")):
        return 1
    stage = _STAGE.match(name)
    if stage is None:
        return None
    k, rest = int(stage[1]) + 1, stage[2]
    if rule == "stage":
        return k + 1
    return 2 * k if _FIRST_HALF.match(rest) else 2 * k + 1
