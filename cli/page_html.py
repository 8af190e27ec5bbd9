"""Builds HTML. Plain text is `str` and gets escaped; finished markup is `Html` and does not."""

from __future__ import annotations

from html import escape


class Html(str):
    """Finished markup; not escaped again."""

    __slots__ = ()


Child = str | None


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """An element. `class_` becomes `class`, `data_site` becomes `data-site`; attributes that are None or False are omitted."""
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Concatenates escaped texts and markup; None is skipped."""
    return Html("".join(child if isinstance(child, Html) else _clean(child) for child in children if child is not None))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_clean(str(value))}"'


def _clean(text: str) -> str:
    """Escaped text; characters not allowed in HTML (control characters, lone surrogates) are written as escape sequences."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown), quote=True)


def short(number: int) -> str:
    """A count with three significant digits and a unit: `12.3 k`, `135 M`; below 10,000 in full."""
    if number < 10_000:
        return f"{number:,}"
    value = float(number)
    for unit in ("k", "M", "B", "T"):
        value /= 1000
        if value < 999.5 or unit == "T":
            break
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 block`, `30 blocks`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def with_code(text: str) -> Html:
    """A sentence in which text between backticks becomes a code element."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # an unpaired backtick
        return join(text)
    return join(*(tag("code", piece) if i % 2 else piece for i, piece in enumerate(pieces)))


def breakable(path: str, at: str = ".") -> Html:
    """A path that may wrap after each `at` character."""
    pieces = [piece for name in path.split(at) for piece in (name, join(at, Html("<wbr>")))]
    return join(*pieces[:-1])
