"""Evaluate an exported model on a config's test sets, alone or beside the model it came from."""

import logging
import sys
from pathlib import Path

from d2dense import config, export
from d2dense.errors import ToolParser, UserError, run_tool
from d2dense.evaluation import write_results
from d2dense.export import comparison


def parser():
    result = ToolParser(description=__doc__)
    add = result.add_argument
    add("--model", required=True, help="model.ts, .pt2 or .onnx, with its .json beside it")
    add("--config-file", required=True, help="a path or a model-zoo name; its test sets are used")
    add("--device", default="cpu")
    add("--output", type=Path, help="folder for predictions and results.json")
    add("--compare", action="store_true", help="evaluate the model of the config too")
    add("--weights", help="with --compare: checkpoint of the model, in place of the config's")
    add("overrides", nargs="*", help="KEY VALUE or key=value")
    return result


def main(argv=None):
    args = parser().parse_intermixed_args(argv)
    if args.weights and not args.compare:
        raise UserError("--weights is for --compare; a file has its weights inside")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = config.load(args.config_file, args.overrides)
    if config.is_multi_scale(cfg):
        raise UserError(
            "the config asks for tests at several sizes, but a file sees each image once; set "
            "TEST.AUG.ENABLED False / train.test_aug.enabled=false"
        )

    def folder(name):
        return None if args.output is None else str(args.output / name)

    found = export.evaluate_exported(args.model, cfg, output_dir=folder("file"), device=args.device)
    results = {"file": found}
    if args.compare:
        results["model"] = comparison.evaluate_eager(
            cfg, weights=args.weights, output_dir=folder("model"), device=args.device
        )
    print(comparison.metric_table(found, results.get("model")))
    if args.compare:
        worst, where = comparison.largest_difference(found, results["model"])
        print(f"largest difference of any metric: {worst:.2e}" + (f" ({where})" if where else ""))
    if args.output is not None:
        write_results(results, args.output / "results.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
