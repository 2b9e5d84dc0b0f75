"""``torchrun`` whose processes are forks of it: ``-m tests.torchrun`` and torchrun's own arguments.

The agent, its meeting place, variables and restarts are PyTorch's; the processes that it starts
have imported everything already. ``tests/engine/test_launch.py`` has one that starts interpreters.
"""

import runpy
import sys

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch


class _Forking(elastic_launch):
    def __init__(self, config, entrypoint):
        del entrypoint  # the interpreter
        config.start_method = "fork"
        super().__init__(config, _script)


def _script(*words):
    assert words[0] == "-u", words
    sys.argv = list(words[1:])
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    run.elastic_launch = _Forking
    run.main()
