"""`python benchmarks/gpu`: `run.main`; with `--process`, one of the processes that it starts, see `inner`."""

import sys

import run

sys.exit(run.inner(sys.argv[2:]) if sys.argv[1:2] == ["--process"] else run.main(sys.argv[1:]))
