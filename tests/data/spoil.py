"""Ways to spoil a file, each with what the error says: ``PICTURES`` for one of 64x48 pixels,
``LABELS`` for a label map of 60x40 with three classes.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def bomb(path: Path) -> None:
    # the header of a PNG of 60000x60000 pixels, which PIL refuses before it reads any
    size = (60_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + b"\x08\x02\0\0\0"
    check = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + check + b"\0\0\0\0IDAT")


def save(mode: str, dtype, value):
    def spoil(path: Path) -> None:
        Image.fromarray(np.full((48, 64), value, dtype), mode).save(path, format="TIFF")

    return spoil


PICTURES = {
    "truncated": (truncate, "truncated"),
    "zero bytes": (lambda path: path.write_bytes(b""), "it is empty"),
    "missing": (Path.unlink, "No such file"),
    "folder": (replace_by_folder, "Is a directory"),
    "text": (lambda path: path.write_text("<html>404</html>"), "not a picture"),
    "other size": (lambda path: Image.new("RGB", (65, 48)).save(path), "is 65x48, .* says 64x48"),
    "floats": (save("F", np.float32, 0.5), "floats"),
    "32 bits": (save("I", np.int32, 200), "32-bit"),
    "large numbers": (save("I", np.int32, 70_000), "outside 0 to 65535"),
    "bomb": (bomb, "exceeds limit"),
}

LABELS = {
    "other size": (lambda p: Image.new("L", (59, 40)).save(p), "is 59x40, but its image is 60x40"),
    "colour": (lambda p: Image.new("RGB", (60, 40)).save(p), "3 channels"),
    "missing": (Path.unlink, "No such file"),
    "zero bytes": (lambda p: p.write_bytes(b""), "it is empty"),
    "truncated": (truncate, "truncated|broken|cannot read label map"),
    "bomb": (bomb, "exceeds limit"),
    "floats": (lambda p: Image.new("F", (60, 40)).save(p, format="TIFF"), "holds floats"),
    "unknown class": (lambda p: Image.new("L", (60, 40), 77).save(p), "class 77.*classes 0 to 2"),
}
