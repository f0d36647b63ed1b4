"""Many pairs: which files belong together, what is still to be done, and doing it without idle hands."""
