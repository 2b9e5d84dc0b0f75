"""Names that MMDetection gives to what several detectors have in common, as our name -> theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["DECODER_ATTENTIONS", "ENCODER_ATTENTIONS", "renamed", "transformer_layers"]

# of our deformable transformers
ENCODER_ATTENTIONS = {"attention": "attentions.0"}
DECODER_ATTENTIONS = {"self_attention": "attentions.0.attn", "cross_attention": "attentions.1"}


def transformer_layers(count: int, attentions: Mapping[str, str]) -> dict[str, str]:
    """Return the names of ``layers.<i>``, given those of their attentions, with one norm after each
    and after the perceptron.
    """
    names = {
        **attentions,
        "ffn.linear1": "ffns.0.layers.0.0",
        "ffn.linear2": "ffns.0.layers.1",
        **{f"norm{k + 1}": f"norms.{k}" for k in range(len(attentions) + 1)},
    }
    return {
        f"layers.{i}.{ours}": f"layers.{i}.{theirs}"
        for i in range(count)
        for ours, theirs in names.items()
    }


def renamed(names: Iterable[str], parts: Mapping[str, str]) -> dict[str, str]:
    """Return those of ``names`` that lie in a part of ``parts`` -> the name that they have there.

    Args:
        names: of tensors
        parts: our modules or tensors -> theirs; the innermost one counts
    """
    found = {}
    for name in names:
        part, rest = name, ""
        while part and part not in parts:
            part, _, last = part.rpartition(".")
            rest = f".{last}{rest}"
        if part:
            found[name] = parts[part] + rest
    return found
