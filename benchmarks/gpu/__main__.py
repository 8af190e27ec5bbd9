"""`python benchmarks/gpu` is `run.main`."""

import sys

import run

sys.exit(run.main(sys.argv[1:]))
