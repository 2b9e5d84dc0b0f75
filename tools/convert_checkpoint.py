"""Give the weights of another code base the names of a model of this library, and say what became
of each.
"""

import sys
from collections.abc import Mapping

from d2dense import checkpoint, config
from d2dense.errors import ToolParser, UserError, run_tool


def main(argv=None):
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help=f"whose names: {', '.join(checkpoint.sources())}",
        metavar="NAME",
    )
    parser.add_argument("--config-file", required=True, help="a path or a model-zoo name")
    parser.add_argument("--key", help="the entry of INPUT that holds the weights (model_ema, ...)")
    parser.add_argument("input", metavar="INPUT", help="the other code base's checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="file to write, for MODEL.WEIGHTS")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE or key=value")
    args = parser.parse_intermixed_args(argv)
    model = config.build_model(config.load(args.config_file, args.overrides), device="cpu")
    content = checkpoint.read(args.input)
    weights = content[_key(content, args.key)]
    report = checkpoint.convert_with_report(weights, args.source, model)
    checkpoint.write(args.output, {"model": report.weights})
    print(f"{len(report.weights)} tensors used")
    _print("in the file, not in the model", report.unused)
    _print("in the model, not in the file", report.missing)


def _key(content, key):
    key = key or "model"
    if not isinstance(content.get(key), Mapping):
        found = [name for name, value in content.items() if isinstance(value, Mapping)]
        raise UserError(f"the file has no weights under {key!r}; --key may be {', '.join(found)}")
    return key


def _print(what, names):
    print(f"{len(names)} tensors {what}{':' if names else ''}")
    for name in names:
        print(f"  {name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
