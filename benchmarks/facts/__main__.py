"""Trains models on facts and compares what they recall: `python benchmarks/facts [STUDY]`.

Without a STUDY: all models, each tuned over the same learning rates, on facts and on two rules that need no memory; 55
minutes on two idle cores. Each run is a process with one thread, `--jobs` run at a time; a finished run is kept in
`--out` and not repeated, so an interrupted study goes on where it was. Prints tables and what they say, and writes them to
`--out`, with all numbers as JSON and plots.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "gpu"))  # after this folder
import import_checkout

import_checkout.ensure()  # on a GPU machine memrewrite need not be installed
from program import main  # noqa: E402

if __name__ == "__main__":
    main(__doc__.splitlines()[0])
