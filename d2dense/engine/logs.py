"""Where the log lines of a run go."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

__all__ = ["setup_logging"]

_FORMAT = "[%(asctime)s %(levelname).1s %(name)s] %(message)s"
_DATE = "%m-%d %H:%M:%S"
_MARK = "_d2dense_handler"
# Loggers that say at every loader how they store its records.
_TALKATIVE = ("detectron2.data.common",)


def setup_logging(output_dir: str | Path | None = None, *, rank: int = 0) -> None:
    """Log to the console (main process only) and to ``log.txt`` in the output folder.

    Calling it again replaces what the last call set up. Other processes write ``log.txt.rank<n>``.
    """
    root = logging.getLogger()
    for handler in [each for each in root.handlers if getattr(each, _MARK, False)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    if output_dir is not None:
        name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
        handlers.append(logging.FileHandler(Path(output_dir) / name))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
        setattr(handler, _MARK, True)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
