"""Analyses of trained detectors and of backbones, on any config and any detection data set.

| module | answers |
|---|---|
| ``quality`` | how well an image's objects are found, and on which images one model beats another |
| ``gradients`` | which pixels the loss depends on |
| ``areas`` | how large the regions are that it depends on |
| ``fusion`` | how early a backbone fuses features of several scales |

The measures are those of appendix B and section 3 of the CEDNet paper (arXiv 2302.06052), which
leaves several choices open; each module says what was chosen.
"""
