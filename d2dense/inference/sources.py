"""Where pictures come from: files, folders, patterns and videos."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from d2dense.data.reading import SampleError
from d2dense.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Source", "Video", "expand", "frames", "open_video"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: the file.
        name: file name to write results under; unique among all sources.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def expand(inputs: Sequence[str | Path]) -> list[Source]:
    """Find the files behind inputs: each a file, a folder (its pictures and videos, sorted) or a
    pattern such as ``photos/**/*.jpg``.

    A plain file is taken as it is, even if it does not exist: reading it gives the error, and
    the other files are still done.

    Raises:
        UserError: a folder without pictures, or a pattern that matches nothing.
    """
    paths: list[Path] = []
    for text in map(str, inputs):
        path = Path(text).expanduser()
        if path.is_dir():
            found = [p for p in sorted(path.iterdir()) if p.is_file() and _is_known(p)]
            if not found:
                raise UserError(f"folder {text} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
        elif not path.exists() and glob.has_magic(text):
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            found = [p for p in found if p.is_file()]
            if not found:
                raise UserError(f"no file matches {text!r}")
        else:
            found = [path]
        paths += found
    unique = list(dict.fromkeys(paths))
    return [Source(path, name) for path, name in zip(unique, _unique_names(unique))]


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """Return file names; repeated ones (from several folders) get a number: ``a.jpg, a_2.jpg``."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, count = path.name, 1
        while name.lower() in taken:
            count += 1
            name = f"{path.stem}_{count}{path.suffix}"
        taken.add(name.lower())
        names.append(name)
    return names


@dataclass
class Video:
    """An open video file: ``fps``, the frames its header announces (0: unknown), and a reader."""

    path: Path
    fps: float
    announced: int
    capture: cv2.VideoCapture


def open_video(path: str | Path) -> Video:
    """Open a video.

    Raises:
        SampleError: the file is missing or no video that OpenCV reads.
    """
    capture = cv2.VideoCapture(str(path)) if Path(path).is_file() else None
    if capture is None or not capture.isOpened():
        reason = "not a video OpenCV reads" if capture is not None else "no such file"
        raise SampleError(f"cannot read video {path}: {reason}", str(path))
    fps = capture.get(cv2.CAP_PROP_FPS)
    count = int(max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0))
    return Video(Path(path), fps if 0 < fps < 1000 else 25.0, count, capture)


def frames(video: Video) -> Iterator[np.ndarray]:
    """Yield the frames, BGR uint8 (H, W, 3); the video is closed at the end.

    Raises:
        SampleError: not a single frame can be decoded.
    """
    count = 0
    try:
        while True:
            done, frame = video.capture.read()
            if not done:
                break
            count += 1
            yield frame
    finally:
        video.capture.release()
    if not count:
        raise SampleError(f"cannot read video {video.path}: it holds no frame", str(video.path))
