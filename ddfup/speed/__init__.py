"""How fast things run on this machine, and how much memory they take; how good they are is `ddfup.benchmark`'s."""
