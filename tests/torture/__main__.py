"""`python -m tests.torture`: see `--help`."""

import sys
from pathlib import Path

# The tests' own modules are imported by their names below tests/, as pytest does.
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from torture.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
