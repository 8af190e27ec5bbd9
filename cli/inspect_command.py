"""The three outputs of `inspect`: tables, the explanation of one path, or an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memrewrite.errors import UserError

if TYPE_CHECKING:
    from memrewrite.cli.session import Session
    from memrewrite.passes.storage.source import ModelSource
    from memrewrite.recipes.schema import Recipe


def refuse_options(why: str | None, html: Path | None, recipe: str | None, *, overwrite: bool, read: list[str]) -> None:
    """Raise `UserError` for options that exclude each other, and for a page that must not or cannot be written."""
    if why is not None and html is not None:
        raise UserError("--why and --html cannot be combined", hint="run `inspect` once with each")
    if recipe is not None and html is None:
        raise UserError("--recipe needs --html", hint="add --html FILE, or use `memrewrite plan MODEL RECIPE`")
    if html is not None:
        from memrewrite.cli.output_path import refuse
        from memrewrite.output_target import Target

        refuse(Target(html, overwrite=overwrite), read=[*read, *([recipe] if recipe else [])])


def tables(current: Session, source: ModelSource) -> None:
    """Print every MLP and near miss."""
    from memrewrite.cli import text_output
    from memrewrite.passes import pipeline

    inspection = pipeline.inspect(source.model, source.inputs, step=current.step)
    current.show(inspection.model_dump(mode="json"), lambda out: text_output.show_inspection(out, inspection))


def why(current: Session, source: ModelSource, path: str) -> None:
    """Print what one path is, or which rule refused it."""
    from memrewrite.cli.explanation_text import show_explanation
    from memrewrite.passes import pipeline

    answer = pipeline.explain(source.model, path, source.inputs, step=current.step)
    current.show(answer.model_dump(mode="json"), lambda out: show_explanation(out, answer))


def page(current: Session, source: ModelSource, html: Path, recipe: Recipe | None, *, overwrite: bool) -> None:
    """Write the page, with what the recipe would do if there is one; print every MLP and near miss."""
    from memrewrite.cli import text_output
    from memrewrite.cli.output_path import write_page
    from memrewrite.cli.page import page as html_of
    from memrewrite.output_target import Target
    from memrewrite.passes import pipeline

    inspection, root, plan = pipeline.survey(source.model, source.inputs, recipe, step=current.step)
    current.step("writing the page")
    write_page(Target(html, overwrite=overwrite), html_of(Path(source.name).name, root, inspection, plan))
    document = {**inspection.model_dump(mode="json"), "page": str(html)}
    current.show(document, lambda out: text_output.show_inspection(out, inspection, html))
