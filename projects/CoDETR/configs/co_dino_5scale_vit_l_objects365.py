"""Pre-training on Objects365, 26 epochs: Co-DINO on EVA-02's ViT-L with 1500 queries. The recipe is
not published; what is not known is that of COCO.

Set ``train.init_checkpoint`` to EVA-02's eva02_L_pt_m38m_medft_in21k_ft_in1k_p14. The files are
expected as in co_dino_5scale_swin_l_objects365.
"""

from codetr import nodes

from .common.recipes import OBJECTS365_IMAGES, adamw_vit, coco, objects365, schedule

model = nodes.co_dino_vit_large(num_classes=365)
datasets = objects365()
dataloader = coco()
optimizer = adamw_vit()
train, lr_multiplier = schedule(26, 24, init="", warmup_iters=500, images=OBJECTS365_IMAGES)
