"""Where CEDNet fuses features first, for :mod:`d2dense.analyses.fusion`."""

from __future__ import annotations

from torch import nn

from d2dense.errors import UserError

from .backbone import CEDNet

__all__ = ["parts_before_fusion"]


def parts_before_fusion(backbone: CEDNet) -> list[nn.Module]:
    """Return what runs before the first decoder (paper, section 3)."""
    trunk = backbone.trunk
    first = trunk.stages[0]
    if first.decoder is None:
        raise UserError(
            "this CEDNet has one stage without decoder and fuses no features in it; set "
            "MODEL.CEDNET.LAST_DECODER (yaml) or last_decoder (lazy), or give it more stages"
        )
    return [trunk.stem, trunk.first, trunk.down, first.encoder]
