"""The networks of the paper's models by name, without their rates of stochastic depth."""

from detectron2.config import LazyCall as L

from cednet import BottleneckFamily, CEDNetTrunk, CSwinFamily, SwinFamily

next_t = L(CEDNetTrunk)()
next_s = L(CEDNetTrunk)(blocks=[2, 7, 2], num_stages=4, layer_rule="half_stage")
next_b = L(CEDNetTrunk)(
    widths=[128, 256, 448, 704], blocks=[2, 7, 2], num_stages=4, layer_rule="half_stage"
)
swin_t = L(CEDNetTrunk)(family=L(SwinFamily)(), widths=[96, 160, 288, 416])
cswin_t = L(CEDNetTrunk)(
    family=L(CSwinFamily)(), widths=[64, 128, 256, 320], blocks=[2, 8, 1], layer_rule="half_stage"
)
r50_t = L(CEDNetTrunk)(
    family=L(BottleneckFamily)(norm="SyncBN"), widths=[64, 128, 256, 384], blocks=[1, 4, 2]
)
# The results of these two were made with the official order of the rates.
next_t_unet = L(CEDNetTrunk)(style="unet", official_drop_path=True)
next_t_hourglass = L(CEDNetTrunk)(
    style="hourglass", widths=[96, 160, 320, 512], official_drop_path=True
)
# not in the paper
next_t_fpn_convs = L(CEDNetTrunk)(style="fpn_convs", widths=[96, 160, 304, 448], last_decoder=True)
