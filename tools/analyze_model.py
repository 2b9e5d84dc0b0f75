"""Print a model's parameters, multiply-accumulates and structure, by module."""

import json
import sys
from pathlib import Path

from d2dense import config, costs
from d2dense.errors import ToolParser, one_or_more, run_tool


def main(argv=None):
    parser = ToolParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a path or a model-zoo name")
    parser.add_argument(
        "--tasks", nargs="+", choices=["params", "flops", "structure"], default=["params", "flops"]
    )
    parser.add_argument(
        "--input-size", nargs=2, type=one_or_more, default=[800, 1280], metavar=("H", "W")
    )
    parser.add_argument(
        "--without-attention",
        action="store_true",
        help="leave products of activations with activations out of the MACs, as most published "
        "figures do",
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to print")
    parser.add_argument("--json", type=Path, help="also write the whole report here")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE or key=value")
    args = parser.parse_intermixed_args(argv)
    model = config.build_model(config.load(args.config_file, args.overrides), device="cpu")
    report = costs.analyze(
        model,
        tasks=args.tasks,
        input_size=tuple(args.input_size),
        attention=not args.without_attention,
    )
    print(costs.format_report(report, depth=args.depth))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
