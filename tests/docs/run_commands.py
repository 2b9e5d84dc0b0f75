"""Runs command lines of a page one after the other in this process, as the programs they name.

Importing the library takes seconds, so one process does it once. Usage: run_commands.py FILE, a
json list of lists of words, in the folder where the commands are to run. Ends at the first that
fails, with its exit code.
"""

import json
import runpy
import sys
import time
from pathlib import Path


def run(words):
    program, script, *arguments = words
    assert program == "python", words
    if script == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        call = lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)  # noqa: E731
    else:
        sys.argv = [script, *arguments]
        call = lambda: runpy.run_path(script, run_name="__main__")  # noqa: E731
    try:
        call()
    except SystemExit as end:
        return end.code or 0
    return 0


if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        print("$", *words, flush=True)
        start = time.process_time()
        code = run(words)
        print(f"({time.process_time() - start:.1f} s of this process)", flush=True)
        if code:
            sys.exit(code)
