#!/usr/bin/env python3
"""Predict on images, folders, patterns and videos; draw the results and write them as COCO json.

  tools/demo.py --config-file FSCascade/fscascade_tiny_shapes --weights model_final.pth \\
      --input photos/ 'more/**/*.jpg' clip.mp4 --output output/predictions

Config overrides (KEY VALUE or key=value) go to the end, or follow --opts.

Written to the output folder: every picture and video with its predictions drawn, label maps of
semantic models as PNG (``labels/``), and ``predictions.json``. A classifier's five best classes are
printed, too. The exit code is 1 if an input could not be read; the others are done all the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from d2dense.data.reading import SampleError, read_image
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool
from d2dense.inference import (
    CocoResults,
    Predictor,
    Source,
    best_classes,
    class_indices,
    draw,
    expand,
    select,
)
from d2dense.inference.sources import Video, frames, open_video


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="F", help="config of either kind, or zoo name")
    add("--weights", metavar="PATH", help="checkpoint; by default the config's own")
    add("--input", nargs="+", required=True, metavar="I", help="images, folders, patterns, videos")
    add("--output", required=True, metavar="DIR", help="folder for drawings and predictions.json")
    add("--confidence-threshold", "--score-threshold", type=float, default=0.5, metavar="S")
    add("--classes", nargs="+", metavar="NAME", help="keep these classes only")
    add("--top-k", type=one_or_more, metavar="K", help="keep the K best instances per picture")
    add("--batch-size", type=one_or_more, default=1, help="pictures at once through the model")
    add("--device", help="cpu or cuda; replaces the config's device")
    add("--no-draw", action="store_true", help="write the json only")
    add("--opts", nargs="+", default=[], metavar="O", help="changes of the config")
    add("overrides", nargs="*", metavar="KEY VALUE | key=value", help="changes of the config")
    args = parser.parse_intermixed_args(argv)
    args.overrides += args.opts
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"score threshold {args.confidence_threshold} is not within 0 to 1")
    return args


class Demo:
    """One run: predicts, writes, and remembers results and failures."""

    def __init__(self, args: argparse.Namespace):
        self.sources = expand(args.input)
        self.output = Path(args.output)
        self._check_output()
        self.predictor = Predictor(
            args.config_file,
            args.weights,
            args.device,
            args.overrides,
            batch_size=args.batch_size,
        )
        self.metadata = self.predictor.metadata
        self.choice = {
            "score_threshold": args.confidence_threshold,
            "classes": class_indices(args.classes, self.metadata) if args.classes else None,
            "top_k": args.top_k,
        }
        self.is_drawing = not args.no_draw
        self.results = CocoResults(self.metadata)
        self.failures: list[str] = []
        self.seconds = 0.0  # in the model, pre- and post-processing included

    def _check_output(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output} is a file; name a folder")
        for source in self.sources:
            if source.path.parent.resolve() == self.output.resolve():
                raise UserError(
                    f"--output {self.output} holds the input {source.path.name}, which would be "
                    "overwritten; name another folder"
                )
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        videos = [source for source in self.sources if source.is_video]
        pictures = [source for source in self.sources if not source.is_video]
        start = time.perf_counter()
        with tqdm(total=len(pictures), unit="image", disable=not pictures) as bar:
            for batch in self._batches(self._read(pictures, bar)):
                for (source, image), output in zip(batch, self._predict(batch)):
                    self._write_picture(source, image, output)
                    bar.update()
        for source in videos:
            try:
                self._run_video(source)
            except SampleError as error:
                self._fail(str(error))
        self.results.write(self.output / "predictions.json")
        return self._summary(time.perf_counter() - start)

    def _read(self, sources: Sequence[Source], bar: tqdm) -> Iterator[tuple[Source, np.ndarray]]:
        for source in sources:
            try:
                yield source, read_image({"file_name": str(source.path)}, "BGR")
            except SampleError as error:
                self._fail(str(error))
                bar.update()

    def _batches(self, items: Iterator) -> Iterator[list]:
        while batch := list(itertools.islice(items, self.predictor.batch_size)):
            yield batch

    def _predict(self, batch: list[tuple[object, np.ndarray]]) -> list[dict]:
        start = time.perf_counter()
        outputs = self.predictor([image for _, image in batch])
        outputs = [select(output, **self.choice) for output in outputs]  # waits for the device
        self.seconds += time.perf_counter() - start
        return outputs

    def _write_picture(self, source: Source, image: np.ndarray, output: dict) -> None:
        height, width = image.shape[:2]
        self.results.add(source.name, height, width, output)
        if "class_scores" in output:
            found = best_classes(output["class_scores"], self.metadata)
            classes = ", ".join(f"{name} {100 * score:.1f}%" for _, name, score in found)
            tqdm.write(f"{source.name}: {classes}")
        if "sem_seg" in output:
            labels = output["sem_seg"].argmax(dim=0).numpy().astype(np.uint16)
            path = self.output / "labels" / f"{source.name}.png"
            path.parent.mkdir(exist_ok=True)
            _save(path, labels if labels.max() > 255 else labels.astype(np.uint8))
        if self.is_drawing:
            path = self.output / source.name
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
                path = path.with_name(path.name + ".jpg")
            _save(path, draw(image, output, self.metadata))

    def _run_video(self, source: Source) -> None:
        video = open_video(source.path)
        numbered = enumerate(frames(video))
        writer: cv2.VideoWriter | None = None
        try:
            with tqdm(total=video.announced or None, unit="frame", desc=source.name) as bar:
                for batch in self._batches(numbered):
                    for (number, image), output in zip(batch, self._predict(batch)):
                        name = f"{source.name}/{number:06d}"
                        height, width = image.shape[:2]
                        self.results.add(name, height, width, output)
                        if self.is_drawing:
                            writer = writer or self._writer(source, video, image)
                            writer.write(draw(image, output, self.metadata))
                        bar.update()
        finally:
            if writer is not None:
                writer.release()

    def _writer(self, source: Source, video: Video, image: np.ndarray) -> cv2.VideoWriter:
        path = self.output / source.name
        if path.suffix.lower() != ".mp4":
            path = path.with_name(path.name + ".mp4")
        size = (image.shape[1], image.shape[0])
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), video.fps, size)
        if not writer.isOpened():
            raise UserError(f"cannot write video {path}; use --no-draw to write the json only")
        return writer

    def _fail(self, message: str) -> None:
        self.failures.append(message)
        # a terminal clears the progress bar for the message; in a log file the bar stays before it
        start = "" if sys.stderr.isatty() else "\n"
        tqdm.write(f"{start}error: {message}", file=sys.stderr)

    def _summary(self, elapsed: float) -> int:
        count = len(self.results.images)
        if count:
            print(
                f"{count} pictures in {elapsed:.1f} s: {count / elapsed:.1f} FPS with reading and "
                f"drawing, {count / self.seconds:.1f} FPS predicting; {self.output}"
            )
        if self.failures:
            print(
                f"error: {len(self.failures)} of {len(self.sources)} inputs could not be read",
                file=sys.stderr,
            )
        return 1 if self.failures else 0


def _save(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise UserError(f"cannot write {path}; name another --output")


def main(argv: Sequence[str] | None = None) -> int:
    return Demo(parse(argv)).run()


if __name__ == "__main__":
    sys.exit(run_tool(main))
