"""Small dense heads and their inputs, odd objects, and maps that say what a head answers."""

from __future__ import annotations

import torch

from codetr.heads import HEADS
from tests.projects.codetr import plain

SIZES = [(192, 256), (160, 208), (190, 100)]
STRIDES = (8, 16, 32, 64, 128)
CLASSES = 4
# Of the values that give scores and boxes far from those of the start.
SPREADS = {"retinanet": 0.05, "fcos": 0.1, "paa": 0.1, "gfl": 0.2}
ODD = {
    "none": [],
    "no area": [[50.0, 50, 50, 90], [30, 30, 30, 30]],
    "tiny": [[50.0, 50, 50.001, 50.001]],
    "huge": [[-1e5, -1e5, 1e5, 1e5]],
    "twice": [[20.0, 20, 90, 90]] * 2,
    "a thousand": [[i % 90, i // 10, i % 90 + 20, i // 10 + 10 + i % 30] for i in range(1000)],
}


def dense_head(name: str, **settings):
    """The head of that name in ``HEADS``, the same one for the same arguments."""
    torch.manual_seed(0)
    made = HEADS[name](**{"channels": 32, "num_classes": CLASSES, "strides": STRIDES, **settings})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=SPREADS[name])
    return made


def random_case(counts=(7, 0, 30), *, strides=STRIDES, least: float = 0.02):
    """Maps of three images and their objects."""
    maps = plain.random_maps(1, SIZES[0], strides, images=3, channels=32)
    return maps, plain.random_instances(2, SIZES, counts, num_classes=CLASSES, least=least)


def odd_objects(name: str):
    """The :data:`ODD` objects in all images, in the first one only where they are many."""
    some = ODD[name] if len(ODD[name]) < 9 else []
    boxes = [ODD[name], some, some]
    return [plain.instances(size, each, [1] * len(each)) for size, each in zip(SIZES, boxes)]


def show_maps(convs) -> None:
    """Let 3x3 convolutions answer with the maps' channels, one after the other."""
    first = 0
    for conv in convs:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        for row in range(conv.out_channels):
            conv.weight.data[row, first + row, 1, 1] = 1.0
        first += conv.out_channels


def background_maps(channels: int, scores: int):
    """Maps of two images, whose first channels are logits of hardly anything."""
    height, width = SIZES[0]
    maps = [torch.zeros(2, channels, -(-height // s), -(-width // s)) for s in STRIDES]
    for each in maps:
        each[:, :scores] = -10.0
    return maps


def check_detections(head, maps) -> None:
    """Three objects are found in the first image, one of them twice at first and one over the
    sides, a faint one is not; one is found in the second.
    """
    first, second = head.detect(maps, SIZES[:2])
    assert first.pred_classes.tolist() == [2, 1, 0]
    torch.testing.assert_close(first.scores, torch.tensor([0.9, 0.7, 0.6]))
    expected = [[30.0, 20, 70, 60], [31, 20, 70, 60], [0, 10, 256, 150]]
    torch.testing.assert_close(first.pred_boxes.tensor, torch.tensor(expected), atol=1e-3, rtol=0)
    assert second.pred_classes.tolist() == [3]
    expected = torch.tensor([[40.0, 25, 90, 52]])
    torch.testing.assert_close(second.pred_boxes.tensor, expected, atol=1e-3, rtol=0)
    assert second.image_size == SIZES[1]
