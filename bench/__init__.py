"""Microbenchmarks and counts, run from a checkout: `python -m bench COMMAND`."""
