"""Classifiers of EVA-02 and Swin as initial weights: from timm's models and the authors' names."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import nn

from d2dense import checkpoint
from d2dense.errors import UserError
from d2dense.modeling import EVA02ViT, Swin

# timm -> the authors
AUTHORS = {
    ".q_proj.bias": ".q_bias",
    ".v_proj.bias": ".v_bias",
    ".fc1_g.": ".w1.",
    ".fc1_x.": ".w2.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc2.": "mlp.w3.",
}


def random_state(model):
    torch.manual_seed(1)
    return {
        name: torch.rand_like(v) if v.is_floating_point() else v
        for name, v in model.state_dict().items()
    }


def loaded(model, state, folder):
    """``model`` with a neck around it, and the report of loading a file with ``state``."""
    whole = nn.ModuleDict({"backbone": model, "neck": nn.Conv2d(1, 1, 1)})
    path = folder / "classifier.pth"
    torch.save({"model": state}, path)
    return checkpoint.load_weights(whole, path)


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("patch", [14, 16])
def test_eva02(authors, patch, tmp_path):
    classifier = Eva(
        img_size=5 * patch,
        patch_size=patch,
        num_classes=3,
        embed_dim=16,
        depth=2,
        num_heads=2,
        qkv_fused=False,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
    )
    state = random_state(classifier)
    file = dict(state)
    if authors:
        for theirs, name in AUTHORS.items():
            file = {key.replace(theirs, name): value for key, value in file.items()}
        file |= {
            "rope.freqs_cos": torch.zeros(25, 8),
            "blocks.0.attn.rope.freqs_sin": torch.ones(1),
        }
    side = 5 if patch == 16 else 7
    model = EVA02ViT(
        channels=16, depth=2, heads=2, window=3, global_blocks=(1,), position_side=side
    )
    last_norm = model.norm.weight.clone()
    report = loaded(model, file, tmp_path)
    assert sorted(report.missing) == [
        "backbone.norm.bias",
        "backbone.norm.weight",
        "neck.bias",
        "neck.weight",
    ]
    assert torch.equal(model.norm.weight, last_norm)
    for name, value in model.blocks.state_dict().items():
        theirs = "blocks." + name.replace("attn.attention.", "attn.")
        assert torch.equal(value, state[theirs]), name
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    grid = positions[:, 1:].reshape(1, 5, 5, 16).permute(0, 3, 1, 2)
    if patch == 14:
        kernel = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
        grid = F.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.patch_embed.weight.data, kernel)
    torch.testing.assert_close(model.patch_embed.bias.data, state["patch_embed.proj.bias"])
    found = model.position_embedding.data
    torch.testing.assert_close(found[:, 1:], grid.flatten(2).transpose(1, 2))
    assert torch.equal(found[:, :1], positions[:, :1])


@pytest.mark.parametrize("microsoft", [False, True])
@torch.no_grad()
def test_swin(microsoft, tmp_path):
    """The features are those of the classifier, which moves no windows where the map is one: the
    last stage has one block.
    """
    sizes = {"embed_dim": 8, "depths": (2, 2, 2, 1)}
    classifier = timm.create_model(
        "swin_tiny_patch4_window7_224", num_heads=(1, 2, 4, 8), num_classes=3, **sizes
    ).eval()
    torch.manual_seed(1)
    for parameter in classifier.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    state = classifier.state_dict()
    if microsoft:
        for i in (1, 2, 3):
            for name in [key for key in state if key.startswith(f"layers.{i}.downsample")]:
                state[name.replace(f"layers.{i}", f"layers.{i - 1}")] = state.pop(name)
        state = {key.replace("head.fc.", "head."): value for key, value in state.items()}
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
        state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49)
    model = Swin(**sizes, heads=(1, 2, 4, 8), drop_path_rate=0.0).eval()
    report = loaded(model, state, tmp_path)
    assert list(report.missing) == [
        *(f"backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")),
        "neck.weight",
        "neck.bias",
    ]
    model.norm3.load_state_dict(classifier.norm.state_dict())
    x = torch.randn(1, 3, 224, 224)
    expected = classifier.forward_features(x).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x)["res5"], expected, rtol=1e-4, atol=1e-4)


def test_own_checkpoints_are_no_classifiers(tmp_path):
    model = Swin(embed_dim=8, heads=(1, 2, 4, 8))
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    assert not checkpoint.load_weights(model, tmp_path / "own.pth").missing


@pytest.mark.parametrize("source", ["eva02_classifier", "swin_classifier"])
def test_models_without_such_a_backbone_are_refused(source):
    with pytest.raises(UserError, match="Conv2d has 0"):
        checkpoint.convert({"a": torch.zeros(1)}, source, nn.Conv2d(1, 1, 1))
