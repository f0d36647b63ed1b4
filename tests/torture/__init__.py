"""What `ddfup` promises, tried at length: kills, signals, full disks, hostile files, ten thousands of mutations.

`python -m tests.torture` runs every promise at its figure and prints a table; the suite runs the same functions
with small counts.
"""
