"""Co-DINO on EVA-02's ViT-L for LVIS after Objects365, 16 epochs of large-scale jitter at 1536
pixels, federated loss (Table 6).

Set ``train.init_checkpoint`` to the weights of co_dino_5scale_vit_l_objects365, and
``train.reinit_misshaped=true``: its classes and its number of queries are others.
"""

from codetr import nodes

from .common.recipes import LVIS_IMAGES, adamw, federated, lvis, schedule, squares

model = nodes.co_dino_vit_large_lvis()
squares(federated(model), 1536)
dataloader = lvis(size=1536)
optimizer = adamw(lr=5e-5, weight_decay=0.05)
train, lr_multiplier = schedule(16, 9, 15, init="", warmup_iters=500, images=LVIS_IMAGES)
train.activation_checkpointing = True
