"""Runs the command line from a checkout: ``python cli.py upsample ...``."""

import sys

from ddfup.cli import main

if __name__ == "__main__":
    sys.exit(main())
