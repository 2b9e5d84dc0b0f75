#!/usr/bin/env python
"""Train or evaluate: projects/FSCascade/train_net.py --config-file F [flags] [overrides...]."""

import sys

from d2dense.engine.train_net import main
from d2dense.errors import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
