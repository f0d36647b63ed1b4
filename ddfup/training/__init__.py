"""Training of the networks; a leaf of the package that only the command line imports."""
