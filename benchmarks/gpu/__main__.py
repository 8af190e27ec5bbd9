"""`python benchmarks/gpu` runs `run.main`."""

import sys

import run

sys.exit(run.main(sys.argv[1:]))
