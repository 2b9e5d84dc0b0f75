"""Co-DINO on EVA-02's ViT-L after Objects365, 12 epochs of larger images; averaged weights (Table
5).

Set ``train.init_checkpoint`` to the weights of co_dino_5scale_vit_l_objects365, and
``train.reinit_misshaped=true``: its classes are others.
"""

from codetr import nodes

from .common.recipes import adamw_vit, coco, schedule

model = nodes.co_dino_vit_large()
dataloader = coco(min_sizes=range(480, 1537, 32), max_size=2400, test_size=(1280, 2048))
optimizer = adamw_vit()
train, lr_multiplier = schedule(12, 7, init="", warmup_iters=500)
train.ema = {"enabled": True, "decay": 0.9999, "time_constant": 2000.0, "eval": True}
train.activation_checkpointing = True
