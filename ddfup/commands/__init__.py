"""One file per command or family of commands; `ddfup.cli` puts them together."""
