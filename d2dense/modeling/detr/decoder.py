"""The deformable decoder: queries attend to each other and to the encoded levels.

Letters: N images, C channels, Q queries, L levels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from d2dense.layers import MultiScaleDeformableAttention

from .feed_forward import FeedForward
from .memory import Memory
from .queries import Queries

__all__ = ["DeformableDecoder", "DeformableDecoderLayer"]

# (layer, its states (N, Q, C), the references before it) -> boxes (N, Q, 4)
BoxPredictor = Callable[[int, Tensor, Tensor], Tensor]


class DeformableDecoderLayer(nn.Module):
    """Attention between queries, deformable attention to the memory, and a perceptron, each added
    to its input and normalised after.

    Args:
        channels: C
        feedforward: width inside the perceptron
        dropout: probability, after all parts and inside the first and the last
        heads: of both attentions
        levels, points: of the deformable attention
    """

    def __init__(
        self,
        *,
        channels: int,
        feedforward: int,
        dropout: float,
        heads: int,
        levels: int,
        points: int,
    ):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(
            channels, heads, dropout=dropout, batch_first=True
        )
        nn.init.xavier_uniform_(self.self_attention.out_proj.weight)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = MultiScaleDeformableAttention(
            channels=channels, heads=heads, levels=levels, points=points
        )
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels=channels, hidden=feedforward, dropout=dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the new content ``(N, Q, C)``.

        Args:
            content, position: ``(N, Q, C)``
            references: ``(N, Q, L, 2 or 4)``, relative to each level's size, padding included
            mask: see :class:`Queries`
        """
        query = content + position
        if mask is not None and mask.ndim == 3:
            mask = mask.repeat_interleave(self.self_attention.num_heads, dim=0)
        heard, _ = self.self_attention(query, query, content, attn_mask=mask, need_weights=False)
        content = self.norm1(content + self.dropout(heard))
        read = self.cross_attention(
            content + position, references, memory.tokens, memory.shapes, memory.padding
        )
        content = self.norm2(content + self.dropout(read))
        return self.norm3(content + self.ffn(content))


class DeformableDecoder(nn.Module):
    """Layers over the queries.

    Args:
        channels: C
        levels: L
        layers: how many layers
        heads, points: of the attentions
        feedforward: width inside the perceptrons
        dropout: probability
        box_refinement: the boxes that a layer predicts are the references of the next one, which
            sends no gradients back through them
        look_forward_twice: but its heads do, so that its losses teach the box head of the layer
            before too (DINO)
        final_norm: of the states that are returned; refinement takes those without (DINO)
        positions: boxes -> positions of the queries, anew for each layer from its references
            relative to the first level, padding included; None: the queries bring theirs
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        levels: int = 4,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        feedforward: int = 1024,
        dropout: float = 0.1,
        box_refinement: bool = False,
        look_forward_twice: bool = False,
        final_norm: bool = False,
        positions: nn.Module | None = None,
    ):
        super().__init__()
        self.box_refinement = box_refinement
        self.look_forward_twice = look_forward_twice
        self.positions = positions
        self.norm = nn.LayerNorm(channels) if final_norm else nn.Identity()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(
                channels=channels,
                feedforward=feedforward,
                dropout=dropout,
                heads=heads,
                levels=levels,
                points=points,
            )
            for _ in range(layers)
        )

    def forward(
        self, queries: Queries, memory: Memory, predict_boxes: BoxPredictor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states ``(N, Q, C)`` after each layer, and the references ``(N, Q, 2 or 4)``
        that its heads start from.

        Args:
            predict_boxes: what refines the references, see ``box_refinement``
        """
        content, references = queries.content, queries.references
        states, starts, start = [], [], references
        for i, layer in enumerate(self.layers):
            ratios = memory.valid_ratios
            if references.shape[-1] == 4:
                ratios = ratios.repeat(1, 1, 2)
            of_levels = references[:, :, None] * ratios[:, None]
            position = queries.position
            if self.positions is not None:
                position = self.positions(of_levels[:, :, 0])
            content = layer(content, position, of_levels, memory, queries.mask)
            states.append(self.norm(content))
            starts.append(start)
            if self.box_refinement and i + 1 < len(self.layers):
                refined = predict_boxes(i, content, references)
                references = refined.detach()
                start = refined if self.look_forward_twice else references
        return states, starts
