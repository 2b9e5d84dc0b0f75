"""Co-DINO on Swin-L for LVIS after Objects365, 16 epochs of large-scale jitter at 1536 pixels.

Set ``train.init_checkpoint`` to the weights of co_dino_5scale_swin_l_objects365, and
``train.reinit_misshaped=true``: its classes are others.
"""

from codetr import nodes

from .common.recipes import LVIS_IMAGES, adamw, federated, lvis, schedule, squares

model = nodes.co_dino(nodes.swin("large", drop_path=0.3))
squares(federated(model), 1536)
model.denoising.update(num_queries=500, box_noise=0.4)
model.max_detections = 1000
dataloader = lvis(size=1536)
optimizer = adamw(lr=1e-4)
train, lr_multiplier = schedule(16, 8, init="", images=LVIS_IMAGES)
