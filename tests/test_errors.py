"""Errors in one line."""

from __future__ import annotations

import pytest

from memrewrite.errors import ModelError, in_one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError("\n  first\n\n\tsecond  \n"), "ValueError: first second"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (ModelError("what", where="here", hint="that"), "ModelError: what"),
    ],
)
def test_class_and_message(error: Exception, line: str) -> None:
    assert in_one_line(error) == line


def test_the_message_alone() -> None:
    assert in_one_line(ValueError("a\nb"), kind=False) == "a b"
    assert in_one_line(ValueError(), kind=False) == "ValueError"


def test_a_long_message_is_cut() -> None:
    assert len(in_one_line(RuntimeError("word " * 500), kind=False)) == 300
    assert in_one_line(RuntimeError("abcdef"), limit=4) == "RuntimeError: abc…"
