"""Small models for the generated shapes, for tests and comparisons on a CPU. They learn slowly: so
few steps show that all runs, not what a model can do.
"""

from detectron2.config import LazyCall as L

from codetr import nodes
from d2dense.config import common
from d2dense.data import augmentations
from d2dense.modeling import TimmBackbone

_CLASSES = 10
_WIDTH = 64
_STEPS, _BATCH = 800, 8
_resize = {"min_size": [160], "max_size": 160}

dataloader = common.detection_loader(
    train="shapes_train",
    test="shapes_val",
    train_augmentations=L(augmentations.default)(is_train=True, **_resize),
    test_augmentations=L(augmentations.default)(is_train=False, **_resize),
    batch_size=_BATCH,
    workers=0,
    image_format="RGB",
)
optimizer = common.adamw(lr=1e-3, weight_decay=1e-4)
optimizer.params.weight_decay_norm = None
lr_multiplier = common.multistep(
    milestones=[_STEPS * 11 // 12], max_iter=_STEPS, warmup_iters=20, warmup_factor=0.01
)
train = common.train(
    max_iter=_STEPS,
    eval_period=_STEPS // 2,
    seed=0,
    device="cpu",
    clip_gradients={"enabled": True, "clip_type": "full_model", "clip_value": 0.1},
    channels_last=True,
)


def tiny(build, *names):
    """Return a small model of :mod:`codetr.nodes`, with these auxiliary heads."""
    return _shrink(build(_body(), *names, num_classes=_CLASSES, channels=_WIDTH))


def _body():
    """A ResNet of ten convolutions, trained from scratch."""
    node = L(TimmBackbone)(
        name="resnet18",
        out_indices=[1, 2, 3, 4],
        options={"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64]},
        size_divisibility=0,
    )
    return nodes.Body(node, {f"res{k + 2}": width for k, width in enumerate((16, 32, 48, 64))})


def _shrink(model):
    """Make the transformer and the auxiliary heads of a model narrow; return it."""
    for part in (model.encoder, model.decoder):
        part.update(layers=2, heads=4, feedforward=128, dropout=0.0)
    model.queries.num_queries = 50
    if model.get("denoising") is not None:
        model.denoising.num_queries = 20
    for head in model.get("auxiliary_heads", []):
        if "rpn" in head:
            head.hidden = 128
            head.rpn.update(
                train_candidates=500, train_proposals=200, test_candidates=250, test_proposals=100
            )
            head.samples = 128
    return model
