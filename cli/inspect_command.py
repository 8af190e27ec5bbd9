"""What `inspect` shows: tables, the explanation of one path, or a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memrewrite.errors import UserError

if TYPE_CHECKING:
    from memrewrite.cli.session import Session
    from memrewrite.passes.storage.source import Source
    from memrewrite.recipes.schema import Recipe


def refuse(why: str | None, html: Path | None, recipe: str | None, *, overwrite: bool, read: list[str]) -> None:
    """Raise `UserError` for options that do not go together, and for a page that may not be written."""
    if why is not None and html is not None:
        raise UserError("--why and --html show different things", hint="run `inspect` once for each")
    if recipe is not None and html is None:
        raise UserError("--recipe is drawn on a page", hint="give --html FILE, or use `memrewrite plan MODEL RECIPE`")
    if html is not None:
        from memrewrite.cli.output_path import refuse_file

        refuse_file(html, overwrite=overwrite, read=[*read, *([recipe] if recipe else [])])


def tables(current: Session, source: Source) -> None:
    """Every MLP and near miss."""
    from memrewrite.cli import text_output
    from memrewrite.passes import pipeline

    located = pipeline.inspect(source.model, source.inputs, step=current.step)
    current.show(located.model_dump(mode="json"), lambda out: text_output.inspected(out, located))


def why(current: Session, source: Source, path: str) -> None:
    """What one path is, and which rule refused it."""
    from memrewrite.cli.explanation_text import explained
    from memrewrite.passes import pipeline

    answer = pipeline.explain(source.model, path, source.inputs, step=current.step)
    current.show(answer.model_dump(mode="json"), lambda out: explained(out, answer))


def page(current: Session, source: Source, html: Path, recipe: Recipe | None) -> None:
    """Every MLP and near miss, and the page in which they are drawn, with what a recipe would do."""
    from memrewrite.cli import text_output
    from memrewrite.cli.output_path import write_page
    from memrewrite.cli.page import page as drawn
    from memrewrite.passes import pipeline

    located, root, plan = pipeline.survey(source.model, source.inputs, recipe, step=current.step)
    current.step("drawing the page")
    write_page(html, drawn(source.name, root, located, plan))
    document = {**located.model_dump(mode="json"), "page": str(html)}
    current.show(document, lambda out: text_output.inspected(out, located, html))
