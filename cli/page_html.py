"""Markup in which everything is escaped that was not made here: a text is `str`, markup is `Html`."""

from __future__ import annotations

from html import escape


class Html(str):
    """Markup, safe as it is."""

    __slots__ = ()


Child = str | None


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """An element. `class_` is `class`, `data_site` is `data-site`; attributes that are None or False are left out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Texts, escaped, and markup, one after the other; None is nothing."""
    return Html("".join(child if isinstance(child, Html) else _clean(child) for child in children if child is not None))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_clean(str(value))}"'


def _clean(text: str) -> str:
    """Escaped, and what no page may hold (control characters, halves of surrogate pairs) made visible."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown), quote=True)


def short(number: int) -> str:
    """A count as people say it, to three digits: `12.3 k`, `135 M`; small ones whole."""
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


def said(text: str) -> Html:
    """A sentence, what stands between backticks set as code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # a backtick without its other half
        return join(text)
    return join(*(tag("code", piece) if i % 2 else piece for i, piece in enumerate(pieces)))


def named(path: str, at: str = ".") -> Html:
    """A path that may break after its dots, or after another character."""
    pieces = [piece for name in path.split(at) for piece in (name, join(at, Html("<wbr>")))]
    return join(*pieces[:-1])
