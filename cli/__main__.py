"""`python -m memrewrite.cli`, for environments in which the console script is not on the path."""

from __future__ import annotations

from memrewrite.cli import main

if __name__ == "__main__":
    main()
