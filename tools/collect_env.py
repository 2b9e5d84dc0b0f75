"""Print every version, device and missing optional piece: paste it into a bug report."""

import argparse
import sys

from d2dense.environment import collect

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="one line")
    print(collect(brief=parser.parse_args().brief))
    sys.exit(0)
