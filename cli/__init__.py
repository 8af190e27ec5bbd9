"""The command line: arguments in, one call of the passes, tables or JSON out. Importing it loads nothing; `main` does."""

from __future__ import annotations


def main() -> None:
    """The console script `memrewrite`."""
    from memrewrite.cli.app import run

    run()
