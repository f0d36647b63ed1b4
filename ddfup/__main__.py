"""``python -m ddfup``, the form ``torchrun -m`` wants."""

import sys

from ddfup.cli import main

if __name__ == "__main__":
    sys.exit(main())
