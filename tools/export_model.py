"""Export a model to a file that runs without this project, and check the file."""

import logging
import sys

from d2dense import config, export
from d2dense.errors import ToolParser, run_tool


def parser():
    result = ToolParser(description=__doc__)
    add = result.add_argument
    add("--config-file", required=True, help="a path or a model-zoo name")
    add("--format", default="torchscript", help=", ".join(export.FORMATS))
    add("--method", default="trace", help="of TorchScript: " + ", ".join(export.METHODS))
    add("--output", required=True, help="folder for model.ts, .pt2 or .onnx, and model.json")
    add("--weights", help="checkpoint, in place of the config's")
    add("--sample-image", help="picture to trace and check on, best with objects in it")
    add("--evaluate", action="store_true", help="also evaluate the file on the config's test sets")
    add("overrides", nargs="*", help="KEY VALUE or key=value")
    return result


def main(argv=None):
    args = parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = export.export(
            args.config_file,
            overrides=args.overrides,
            output_dir=args.output,
            format=args.format,
            method=args.method,
            weights=args.weights,
            sample_image=args.sample_image,
        )
    except export.CheckError as error:
        print(f"check failed: {error}; nothing was written", file=sys.stderr)
        return 1
    print(f"wrote {result.path} and {result.metadata_path}")
    noun = "detections" if result.task == "detection" else "pixels"
    for check in result.checks:
        print(f"  {check.line(noun)}")
    print(f"check passed in a fresh process: max error {result.max_error:.1e}")
    if args.evaluate:
        cfg = config.load(args.config_file, args.overrides)
        for name, tasks in export.evaluate_exported(result.path, cfg).items():
            for task, metrics in tasks.items():
                shown = ", ".join(f"{k} {v:.2f}" for k, v in metrics.items() if "-" not in k)
                print(f"{name} {task}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
