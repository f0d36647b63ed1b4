"""Depth file formats: one row of FORMATS each (read the header, decode, encode), one file per family.

Not for use from outside: `ddfup.io` is the door.
"""

from __future__ import annotations

from ddfup.formats.base import Format
from ddfup.formats.exr import EXR
from ddfup.formats.numpy_files import NPY, NPZ
from ddfup.formats.pfm import PFM
from ddfup.formats.pgm import PGM
from ddfup.formats.png import PNG
from ddfup.formats.tiff import TIFF

FORMATS: dict[str, Format] = {row.name: row for row in (PNG, TIFF, EXR, PFM, PGM, NPY, NPZ)}
