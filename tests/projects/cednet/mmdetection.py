"""What MMDetection computes from an image's features with the weights of its heads, written down
plainly; nothing here knows of Detectron2.

Boxes are absolute xyxy, an image's size is (height, width), K is the number of classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, roi_align

RATIOS = (0.5, 1.0, 2.0)  # height / width
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def cell_anchors(stride: int, scales) -> list[list[float]]:
    """Anchors around the origin: for each ratio, all scales."""
    cells = []
    for ratio in RATIOS:
        for scale in scales:
            width, height = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
            cells.append([-width / 2, -height / 2, width / 2, height / 2])
    return cells


def anchors(height: int, width: int, stride: int, scales) -> torch.Tensor:
    """Row after row of a map, all anchors of a position together; the first is at (0, 0)."""
    cells = torch.tensor(cell_anchors(stride, scales))
    corners = [[x, y, x, y] for y in range(height) for x in range(width)]
    return (torch.tensor(corners)[:, None] * stride + cells).reshape(-1, 4)


def decode(boxes, deltas, stds=(1.0, 1.0, 1.0, 1.0), size=None):
    """(R, 4) boxes moved by (R, 4) deltas; inside the image if its size is given."""
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x = (boxes[:, 0] + boxes[:, 2]) / 2 + dx * width
    y = (boxes[:, 1] + boxes[:, 3]) / 2 + dy * height
    limit = abs(math.log(16 / 1000))
    width = width * dw.clamp(-limit, limit).exp()
    height = height * dh.clamp(-limit, limit).exp()
    result = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)
    return result if size is None else clip(result, size)


def clip(boxes, size):
    height, width = size
    return torch.stack(
        [side.clamp(0, (width, height)[i % 2]) for i, side in enumerate(boxes.unbind(1))], dim=1
    )


class Heads:
    """The heads of one detector.

    Args:
        weights: under MMDetection's names
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def conv(self, x, name, padding=1):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.bias(name), padding=padding)

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.bias(name))

    def bias(self, name):
        return self.weights.get(f"{name}.bias")

    def count(self, name) -> int:
        """How many layers are called ``name.0``, ``name.1``, ..."""
        return len({k.split(".")[name.count(".") + 1] for k in self.weights if f"{name}." in k})

    # ------------------------------------------------ RetinaNet

    def retinanet(self, levels, size, num_classes: int, clip_first: bool):
        """Scores, classes and boxes of the detections, best first."""
        found = []
        for stride, x in zip((8, 16, 32, 64, 128), levels):
            scores = self._dense(x, "cls").view(-1, num_classes).sigmoid()
            deltas = self._dense(x, "reg").view(-1, 4)
            boxes = anchors(*x.shape[-2:], stride, [4 * 2 ** (i / 3) for i in range(3)])
            rows, classes = (scores > 0.05).nonzero().unbind(1)
            best = scores[rows, classes].sort(descending=True).indices[:1000]
            rows, classes = rows[best], classes[best]
            moved = decode(boxes[rows], deltas[rows], size=size if clip_first else None)
            found.append((scores[rows, classes], classes, moved))
        scores, classes, boxes = (torch.cat(each) for each in zip(*found))
        keep = batched_nms(boxes, scores, classes, 0.5)[:100]
        return scores[keep], classes[keep], clip(boxes[keep], size)

    def _dense(self, x, kind):
        for i in range(self.count(f"bbox_head.{kind}_convs")):
            x = self.conv(x, f"bbox_head.{kind}_convs.{i}.conv").relu()
        return self.conv(x, f"bbox_head.retina_{kind}")[0].permute(1, 2, 0)

    # ------------------------------------------------ proposals

    def proposals(self, levels, size):
        """At most 1000 boxes, best first."""
        scores, boxes, numbers = [], [], []
        for number, (stride, x) in enumerate(zip((4, 8, 16, 32, 64), levels)):
            x = self.conv(x, "rpn_head.rpn_conv").relu()
            score = self.conv(x, "rpn_head.rpn_cls", 0)[0].permute(1, 2, 0).reshape(-1)
            deltas = self.conv(x, "rpn_head.rpn_reg", 0)[0].permute(1, 2, 0).reshape(-1, 4)
            best = score.sort(descending=True).indices[:1000]
            moved = decode(anchors(*x.shape[-2:], stride, [8])[best], deltas[best], size=size)
            solid = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
            scores.append(score[best][solid])
            boxes.append(moved[solid])
            numbers.append(torch.full((int(solid.sum()),), number))
        scores, boxes, numbers = map(torch.cat, (scores, boxes, numbers))
        return boxes[batched_nms(boxes, scores, numbers, 0.7)[:1000]]

    # ------------------------------------------------ regions

    def faster_rcnn(self, levels, size, proposals, num_classes: int):
        """Scores, classes and boxes of the detections, best first."""
        logits, deltas = self._box_head("roi_head.bbox_head", self._pool(levels, proposals, 7))
        return self._detections(logits, deltas, proposals, size, STDS[0], num_classes)

    def mask_rcnn(self, levels, size, proposals, num_classes: int):
        """As :meth:`faster_rcnn`, with mask probabilities (R, 28, 28)."""
        found = self.faster_rcnn(levels, size, proposals, num_classes)
        _, classes, boxes = found
        return *found, self._masks("roi_head.mask_head", self._pool(levels, boxes, 14), classes)

    def cascade(self, levels, size, proposals, num_classes: int):
        """As :meth:`mask_rcnn`."""
        boxes, total = proposals, 0
        for k, stds in enumerate(STDS):
            logits, deltas = self._box_head(f"roi_head.bbox_head.{k}", self._pool(levels, boxes, 7))
            total = total + logits
            if k < 2:
                best = logits[:, :num_classes].argmax(1)
                rows = torch.arange(len(boxes))
                own = deltas.view(-1, num_classes, 4)[rows, best]
                boxes = decode(boxes, own, stds, size)
        found = self._detections(total / 3, deltas, boxes, size, STDS[2], num_classes)
        _, classes, boxes = found
        x = self._pool(levels, boxes, 14)
        masks = [self._masks(f"roi_head.mask_head.{k}", x, classes) for k in range(3)]
        return *found, sum(masks) / 3

    def _box_head(self, name, x):
        for i in range(self.count(f"{name}.shared_convs")):
            layer = f"{name}.shared_convs.{i}"
            x = self._norm(self.conv(x, f"{layer}.conv"), f"{layer}.bn").relu()
        x = x.flatten(1)
        for i in range(self.count(f"{name}.shared_fcs")):
            x = self.linear(x, f"{name}.shared_fcs.{i}").relu()
        return self.linear(x, f"{name}.fc_cls"), self.linear(x, f"{name}.fc_reg")

    def _norm(self, x, name):
        mean, var, weight, bias = (
            self.weights[f"{name}.{kind}"][:, None, None]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def _detections(self, logits, deltas, boxes, size, stds, num_classes):
        scores = logits.softmax(1)[:, :num_classes]  # the background comes last
        rows, classes = (scores > 0.05).nonzero().unbind(1)
        own = deltas.view(-1, num_classes, 4)[rows, classes]
        moved, scores = decode(boxes[rows], own, stds, size), scores[rows, classes]
        keep = batched_nms(moved, scores, classes, 0.5)[:100]
        return scores[keep], classes[keep], moved[keep]

    def _masks(self, name, x, classes):
        for i in range(self.count(f"{name}.convs")):
            x = self.conv(x, f"{name}.convs.{i}.conv").relu()
        up = f"{name}.upsample"
        x = F.conv_transpose2d(x, self.weights[f"{up}.weight"], self.bias(up), stride=2).relu()
        logits = self.conv(x, f"{name}.conv_logits", 0)
        return logits[torch.arange(len(classes)), classes].sigmoid()

    @staticmethod
    def _pool(levels, boxes, side):
        """Boxes of up to 112 pixels (square root of the area) from the finest level, and so on."""
        scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        numbers = (scale / 56 + 1e-6).log2().floor().clamp(0, 3).long()
        pooled = torch.zeros(len(boxes), levels[0].shape[1], side, side)
        for number, stride in enumerate((4, 8, 16, 32)):
            own = numbers == number
            pooled[own] = roi_align(
                levels[number], [boxes[own]], side, 1 / stride, sampling_ratio=0, aligned=True
            )
        return pooled
