"""The door: a command line around the passes. Importing it loads nothing; `main` does."""

from __future__ import annotations


def main() -> None:
    """The console script `memrewrite`."""
    from memrewrite.cli.app import run

    run()
