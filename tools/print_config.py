"""Print a resolved config of either kind, or save it with --output; overrides are applied first."""

import sys

from d2dense import config
from d2dense.errors import ToolParser, run_tool


def main(argv=None):
    parser = ToolParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a path or a model-zoo name")
    parser.add_argument("--output", help="write yaml here instead of printing it")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE or key=value")
    args = parser.parse_intermixed_args(argv)
    cfg = config.load(args.config_file, args.overrides)
    if args.output:
        config.save(cfg, args.output)
    else:
        print(config.dump(cfg), end="")


if __name__ == "__main__":
    sys.exit(run_tool(main))
