"""Does the saved file compute what the model does? Asked in a fresh process, at other sizes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from .adapters import Adapter

__all__ = ["CheckError", "FreshServer", "ImageCheck", "check_images", "verify"]

_SCRIPT = Path(__file__).with_name("fresh_run.py")
_SERVER = Path(__file__).with_name("fresh_server.py")
# Height and width of the check images relative to the traced one: two other shapes, one of them
# upright where the traced one is not.
_SCALES = ((0.73, 1.19), (1.31, 0.67))
_CONTRAST = 0.1  # of the pale image

_FAR = 1e9

# Two scores that are equal but for rounding may come in either order, and with them whatever hangs
# on the order, such as which of DINO's contents goes with which proposal. An image with such scores
# cannot decide. One is known by what a change does to the model that is hardly more than rounding:
# so many grey levels of 255, drawn so many times, for each is likely to leave a tie as it is.
_UNSEEN, _DRAWS = 1e-4, 32
# How often an image that cannot decide is replaced by itself, moved by so many pixels.
_ATTEMPTS, _MOVE = 8, (7, 11)


class CheckError(Exception):
    """The exported model does not compute what the model does."""


@dataclass(frozen=True, kw_only=True)
class ImageCheck:
    """Comparison on one image.

    Attributes:
        height, width: of the image.
        found: number of detections (for semantic segmentation: of pixels).
        error: largest difference of any output value, relative to the value where that is above 1;
            detections whose scores differ by no more than the tolerance may be in any order.
    """

    height: int
    width: int
    found: int
    error: float

    def line(self, noun: str) -> str:
        return f"{self.width} x {self.height}: {self.found} {noun}, max error {self.error:.1e}"


def check_images(image: Tensor, *, largest: int | None = None) -> list[Tensor]:
    """Return images ``(C, h, w)`` uint8 to compare on: ``image`` at two other sizes, and a pale
    one; no side is over ``largest``.

    The pale one has a third size and usually no detections, which must work too.
    """
    _, height, width = image.shape
    images = []
    for scale_h, scale_w in _SCALES:
        size = [max(32, round(height * scale_h)), max(32, round(width * scale_w))]
        size = [min(side, largest or side) for side in size]
        scaled = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)
        images.append(scaled[0].round().clamp(0, 255).to(torch.uint8))
    # not without any contrast: all places would tie, and which of them are proposed is nobody's
    pale = (images[0][:, :-3, :-5].float() - 128) * _CONTRAST + 128
    images.append(pale.round().to(torch.uint8))
    return images


def verify(
    path: str | Path,
    adapter: Adapter,
    images: Sequence[Tensor],
    *,
    tolerance: float = 1e-4,
    server: FreshServer | None = None,
) -> list[ImageCheck]:
    """Run the file in a fresh process without our packages and compare it with eager code.

    An image on which the model itself answers otherwise after a change that nobody could see is
    replaced by the same one, moved around its edges, until it is another or has been several times.

    Args:
        path: of any format.
        adapter: the model that was exported, on the CPU, in evaluation mode.
        images: ``(C, h, w)`` each.
        tolerance: largest allowed error, see :class:`ImageCheck`.
        server: for many files, starts the processes that need torch; None: each starts by itself.

    Raises:
        CheckError: another number of detections, a larger difference, or the file cannot be run.
    """
    if adapter.training:
        raise ValueError("the model must be in evaluation mode")
    run = _run_fresh if server is None else server.run
    checks: list[ImageCheck] = []
    for attempt in range(1, _ATTEMPTS + 1):
        undecided = []
        for image, found in zip(images, run(Path(path), images)):
            expected = _answer(adapter, image)
            try:
                checks.append(_check(adapter, image, expected, found, tolerance))
            except CheckError:
                if attempt == _ATTEMPTS or _decides(adapter, image, expected, tolerance):
                    raise
                undecided.append(image.roll(_MOVE, dims=(1, 2)))
        if not undecided:
            break
        images = undecided
    return checks


class FreshServer:
    """Fresh processes for many files: each is a fork of one that has imported what the file needs
    and can import nothing of this project. ONNX files, which must not need torch, start their own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FreshServer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it

    def run(self, path: Path, images: Sequence[Tensor]) -> list[list[Tensor]]:
        return _run_fresh(path, images, start=_start if path.suffix == ".onnx" else self._ask)

    def _ask(self, job: list[str], folder: str) -> str:
        del folder
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return answer.strip() if answer else "the server of fresh processes ended"


def _start(job: list[str], folder: str) -> str:
    """Run a job in a process of its own and return what went wrong, nothing if nothing did."""
    # -I: neither the working folder nor PYTHONPATH
    command = [sys.executable, "-I", str(_SCRIPT), *job]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _run_fresh(
    path: Path, images: Sequence[Tensor], start: Callable[[list[str], str], str] = _start
) -> list[list[Tensor]]:
    with tempfile.TemporaryDirectory(prefix="d2dense_export_") as folder:
        inputs, outputs = Path(folder, "images.npz"), Path(folder, "results.npz")
        np.savez(inputs, **{str(k): image.numpy() for k, image in enumerate(images)})
        # as many threads as here, for equal sums
        files = [str(each) for each in (path.resolve(), inputs, outputs)]
        reason = start([*files, str(torch.get_num_threads())], folder)
        if reason:
            raise CheckError(f"the file does not run in a fresh process: {reason}")
        results: list[list[Tensor]] = [[] for _ in images]
        with np.load(outputs) as found:
            for name in found.files:  # image.output, in order
                results[int(name.partition(".")[0])].append(torch.from_numpy(found[name]))
        return results


@torch.no_grad()
def _answer(adapter: Adapter, image: Tensor) -> Sequence[Tensor]:
    return adapter(image)


def _decides(adapter: Adapter, image: Tensor, expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether the model's answer stays the same under changes of the image that nobody sees."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        noise = torch.rand(image.shape, generator=generator) * 2 - 1
        answer = _answer(adapter, image.float() + _UNSEEN * noise)
        try:
            _check(adapter, image, expected, answer, tolerance)
        except CheckError:
            return False
    return True


def _check(
    adapter: Adapter,
    image: Tensor,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    tolerance: float,
) -> ImageCheck:
    """Compare two answers; raise a ``CheckError`` if they differ."""
    height, width = image.shape[1:]
    where = f"on an image of {width} x {height}"
    if len(found) != len(adapter.outputs):
        raise CheckError(f"{len(found)} outputs instead of {len(adapter.outputs)} {where}")
    for output, a, b in zip(adapter.outputs, expected, found):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckError(
                f"{output.name} is {b.dtype} {tuple(b.shape)}, but {a.dtype} {tuple(a.shape)} in "
                f"eager mode, {where}"
            )
    names = [output.name for output in adapter.outputs]
    if adapter.task == "detection" and "scores" in names:
        order = _order(expected, found, expected[names.index("scores")], tolerance)
        found = [each[order] for each in found]
    error = 0.0
    for a, b in zip(expected, found):
        if a.numel():
            difference = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1)
            # NaN counts as a difference unless both have it
            difference[a.isnan() & b.isnan()] = 0
            error = max(error, float(difference.nan_to_num(nan=float("inf")).max()))
    if not error <= tolerance:
        raise CheckError(f"largest error {error:.1e} > {tolerance:.0e} {where}")
    found_here = expected[0].shape[0] if adapter.task == "detection" else height * width
    return ImageCheck(height=height, width=width, found=found_here, error=error)


def _order(
    expected: Sequence[Tensor], found: Sequence[Tensor], scores: Tensor, tolerance: float
) -> Tensor:
    """Return an order of the rows of ``found`` in which they are compared: detections in a row
    whose scores differ by no more than ``tolerance`` are paired with the nearest ones.
    """
    order = torch.arange(len(scores))
    ends = ((scores[1:] - scores[:-1]).abs() > tolerance).nonzero()[:, 0] + 1
    for rows in order.clone().tensor_split(ends.tolist()):
        if len(rows) > 1:
            a, b = (
                torch.cat([each[rows].reshape(len(rows), -1).double() for each in outputs], dim=1)
                for outputs in (expected, found)
            )
            cost = torch.cdist(a, b).square().nan_to_num(nan=_FAR, posinf=_FAR)
            order[rows] = rows[linear_sum_assignment(cost.numpy())[1]]
    return order
