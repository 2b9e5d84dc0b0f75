"""Co-DINO on Swin-L after Objects365, 16 epochs of larger images.

Set ``train.init_checkpoint`` to the weights of co_dino_5scale_swin_l_objects365, and
``train.reinit_misshaped=true``: its classes are others.
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.co_dino(nodes.swin("large", drop_path=0.3, size_divisibility=32))
model.denoising.update(num_queries=500, box_noise=0.4)
dataloader = coco(min_sizes=range(480, 1537, 32), max_size=2048, test_size=(1280, 2048))
optimizer = adamw(lr=1e-4)
train, lr_multiplier = schedule(16, 8, init="")
