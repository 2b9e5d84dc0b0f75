"""Names of MMDetection for parts that several detectors share."""

from d2dense.checkpoint.mmdetection import ENCODER_ATTENTIONS, renamed, transformer_layers


def test_layers_of_an_encoder():
    assert transformer_layers(2, ENCODER_ATTENTIONS) == {
        "layers.0.attention": "layers.0.attentions.0",
        "layers.0.ffn.linear1": "layers.0.ffns.0.layers.0.0",
        "layers.0.ffn.linear2": "layers.0.ffns.0.layers.1",
        "layers.0.norm1": "layers.0.norms.0",
        "layers.0.norm2": "layers.0.norms.1",
        "layers.1.attention": "layers.1.attentions.0",
        "layers.1.ffn.linear1": "layers.1.ffns.0.layers.0.0",
        "layers.1.ffn.linear2": "layers.1.ffns.0.layers.1",
        "layers.1.norm1": "layers.1.norms.0",
        "layers.1.norm2": "layers.1.norms.1",
    }


def test_the_innermost_part_counts():
    parts = {"a": "x", "a.b": "y.z", "a.b.c.weight": "w"}
    names = ["a.weight", "a.b.c.bias", "a.b.c.weight", "ab.weight", "c.a.weight"]
    assert renamed(names, parts) == {
        "a.weight": "x.weight",
        "a.b.c.bias": "y.z.c.bias",
        "a.b.c.weight": "w",
    }
