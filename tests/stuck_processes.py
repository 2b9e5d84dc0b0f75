"""Imported by the server whose forks are the processes of runs: one that is stuck writes where it
is, and ends, so that its test fails with a reason and before its time is up.
"""

import faulthandler
import os

SECONDS = 300
_SERVER = os.getpid()


def watch() -> None:
    # not in a fork of such a process: the lock of its timer is held there by a thread that is gone
    if os.getppid() == _SERVER:
        faulthandler.dump_traceback_later(SECONDS, exit=True)


os.register_at_fork(after_in_child=watch)
