"""The recipe of the Swin baselines: no layer-wise decay, and weight decay of all but norms and
position biases.
"""

from .coco import dataloader, lr_multiplier, optimizer, train

optimizer.params.update(
    layer_decay=1.0,
    weight_decay_1d=None,
    weight_decay_heads=None,
    no_decay_names=["relative_position_bias_table"],
)
