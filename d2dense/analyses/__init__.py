"""Analyses of trained models and of backbones, on any config and any dataset that fits.

| module | answers |
|---|---|
| ``quality`` | how well an image's objects are found, and on which images one model beats another |
| ``gradients`` | which pixels the loss depends on |
| ``areas`` | how large the regions are that it depends on |
| ``fusion`` | how early a backbone fuses features of several scales |
| ``discriminability`` | how much stronger features are on objects than elsewhere |
| ``attention_maps`` | where the queries that get an object look |
| ``instability`` | how often queries change their objects from checkpoint to checkpoint |
| ``head_distance`` | how differently the heads of a detector look at the same features |
| ``query_distance`` | how far queries are from what auxiliary heads assign to their objects |
| ``label_maps`` | what segmenters predict, side by side |
| ``kernels`` | how alike the class kernels of a model are |

The measures are those of the CEDNet paper (arXiv 2302.06052, appendix B and section 3), from
``discriminability`` on those of the Co-DETR paper (arXiv 2211.12860), and the last two are for the
HFGD paper. Several choices are left open there; each module says what was chosen.
"""
