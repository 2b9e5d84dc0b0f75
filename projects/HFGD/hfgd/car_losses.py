"""Class-aware regularisations (CAR, ECCV 2022): three losses on pixel features and class centres.

Letters: N images, C channels, H and W of the labels, h and w of the features, P = N h w pixels, K
classes.
"""

# No postponed annotations here: TorchScript reads those of unused methods as objects.
import torch
from torch import Tensor, nn

from d2dense.layers import sum_over_processes

from .layers import at_least_float32, no_autocast

__all__ = ["CARLosses", "nearest_labels"]

_CLIP = 1e-7  # of a row's or a pixel's excess, at both ends of [0, 1]
_INTRA_FLOOR = 1e-5


def nearest_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Return labels ``(N, H, W)`` at ``(N, height, width)``, the nearest with aligned corners:
    row i is row round(i (H - 1) / (height - 1)), halves up.
    """
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) * (old - 1) + new - 1) // max(2 * (new - 1), 1)
        for old, new in zip(labels.shape[-2:], (height, width))
    )
    return labels[:, rows[:, None], columns]


class CARLosses(nn.Module):
    """The three losses, each the square of a mean.

    Class centres are means over the pixels of all images of all processes; a class that none shows
    has its centre at 0 and takes part all the same. Everything is float32 at least.

    Args:
        intra: distance of pixels to the centre of their class.
        c2c: similarity of centres of different classes.
        c2p: similarity of pixels to centres of other classes.
        intra_weight, c2c_weight, c2p_weight: factors.
        c2c_threshold, c2p_threshold: similarity that is allowed to all other classes together.
        c2p_mask_ignored: leave ignored pixels out of c2p. The official code does not, and pushes
            them away from all centres.
        global_means: the means of intra and c2p are over all processes, so that processes add up
            to one with the whole batch; the official code squares the mean of each process.
    """

    def __init__(
        self,
        *,
        intra: bool = True,
        c2c: bool = True,
        c2p: bool = True,
        intra_weight: float = 1.0,
        c2c_weight: float = 1.0,
        c2p_weight: float = 1.0,
        c2c_threshold: float = 0.5,
        c2p_threshold: float = 0.25,
        c2p_mask_ignored: bool = False,
        global_means: bool = True,
    ):
        super().__init__()
        self.intra, self.c2c, self.c2p = intra, c2c, c2p
        self.intra_weight, self.c2c_weight, self.c2p_weight = intra_weight, c2c_weight, c2p_weight
        self.c2c_threshold, self.c2p_threshold = c2c_threshold, c2p_threshold
        self.c2p_mask_ignored = c2p_mask_ignored
        self.global_means = global_means

    @torch.jit.unused
    def forward(
        self, features: Tensor, targets: Tensor, num_classes: int, ignore_value: int
    ) -> dict[str, Tensor]:
        """Return ``loss_car_intra``, ``loss_car_c2c`` and ``loss_car_c2p``, those that are on.

        Every process of a run must call it equally often.

        Args:
            features: ``(N, C, h, w)``.
            targets: ``(N, H, W)``, of the images' size.
            num_classes: K, at least 2.
            ignore_value: label of no class.
        """
        if not (self.intra or self.c2c or self.c2p):
            return {}
        with no_autocast(features):
            pixels = at_least_float32(features).permute(0, 2, 3, 1).flatten(0, 2)
            labels = nearest_labels(targets, *features.shape[2:]).flatten()
            classes = torch.arange(num_classes, device=labels.device)
            is_class = (labels[:, None] == classes) & (labels != ignore_value)[:, None]
            return self._losses(pixels, is_class)

    def _losses(self, pixels: Tensor, is_class: Tensor) -> dict[str, Tensor]:
        """Return the losses of pixels (P, C), whose classes are the true elements of (P, K)."""
        centres = _centres(pixels, is_class)
        losses, means = {}, {}
        if self.c2c:
            excess = _centre_excess(centres, self.c2c_threshold)
            losses["loss_car_c2c"] = self.c2c_weight * excess.mean().square()
        centres = centres.detach()
        if self.c2p:
            excess = _pixel_excess(pixels, centres, is_class, self.c2p_threshold)
            count = pixels.new_full((), len(pixels))
            if self.c2p_mask_ignored:
                is_valid = is_class.any(1)
                excess, count = excess * is_valid, is_valid.sum().to(count)
            means["c2p"] = excess.sum(), count
        if self.intra:
            distance = (is_class.to(pixels) @ centres - pixels).abs() * is_class.any(1)[:, None]
            means["intra"] = distance.sum(), pixels.new_full((), pixels.numel())
        values = self._means(means)
        if self.c2p:
            losses["loss_car_c2p"] = self.c2p_weight * values["c2p"].square()
        if self.intra:
            floored = values["intra"].square().clamp(min=_INTRA_FLOOR)
            losses["loss_car_intra"] = self.intra_weight * floored
        return losses

    def _means(self, parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return sum / count of each, over all processes where that is wanted."""
        if not parts:
            return {}
        sums, counts = (torch.stack(each) for each in zip(*parts.values()))
        if self.global_means:
            sums, counts = sum_over_processes(torch.stack([sums, counts]))
        return dict(zip(parts, sums / counts.detach().clamp(min=1)))


def _centres(pixels: Tensor, is_class: Tensor) -> Tensor:
    """Return the mean (K, C) of the pixels of each class, over all processes."""
    members = is_class.to(pixels)
    sums = torch.cat([members.t() @ pixels, members.sum(0)[:, None]], 1)
    sums = sum_over_processes(sums)
    return sums[:, :-1] / sums[:, -1:].detach().clamp(min=1)


def _centre_excess(centres: Tensor, threshold: float) -> Tensor:
    """Return (K,): how much of each centre's similarity goes to other centres beyond what is
    allowed. The gradient passes through the side of the queries.
    """
    count, channels = centres.shape
    shares = (centres @ centres.detach().t() / channels**0.5).softmax(1)
    excess = (shares - threshold / (count - 1)).clamp(min=0)
    others = ~torch.eye(count, dtype=torch.bool, device=centres.device)
    return (excess * others).sum(1).clamp(_CLIP, 1 - _CLIP)


def _pixel_excess(pixels: Tensor, centres: Tensor, is_class: Tensor, threshold: float) -> Tensor:
    """Return (P,): how much of each pixel's similarity goes to centres of other classes beyond what
    is allowed. The own class's part is the similarity of the centre with itself.
    """
    count, channels = centres.shape
    similarity = torch.where(is_class, centres.square().sum(1), pixels @ centres.t())
    shares = (similarity / channels**0.5).softmax(1)
    excess = (shares - threshold / (count - 1)).clamp(min=0)
    return excess.masked_fill(is_class, 0).sum(1).clamp(_CLIP, 1 - _CLIP)
