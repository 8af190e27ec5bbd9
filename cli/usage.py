"""`usage`: which slots of a saved model's memory a text reads, as tables, JSON and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memrewrite.cli.arguments import Json, Trust
from memrewrite.cli.session import session

if TYPE_CHECKING:
    from rich.console import Console

    from memrewrite.passes.text_usage import TextUsage
    from memrewrite.usage.statistics import LayerUsage, PoolUsage, UsageStatistics


def usage(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that `apply -o` or `save` wrote.", show_default=False)
    ],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Count on this text (UTF-8). Default: on the model's example inputs."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Tokens of a piece of the text. Default: 512, or the model's context if shorter."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a figure: .png, .svg or .pdf. Needs matplotlib.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the figure.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Count which slots of its memory a saved model reads, for each layer and pool."""
    with session(context.obj, as_json) as current:
        from memrewrite.errors import UserError

        if length is not None and text is None:
            raise UserError("--length needs --text", hint="add --text FILE")
        if plot is not None:
            _refuse(plot, read=[str(path) for path in (directory, text) if path is not None], overwrite=overwrite)
        current.step("loading torch")
        from memrewrite.passes.text_usage import text_usage

        counted = text_usage(directory, text, length=length, trust_code=trust_code, step=current.step)
        statistics = counted.usage.statistics()
        if plot is not None:
            current.step("drawing")
            counted.usage.plot(plot, overwrite=overwrite)
        document: dict[str, Any] = {"usage": statistics.model_dump(mode="json"), "pieces": counted.pieces}
        document["plot"] = None if plot is None else str(plot)
        current.show(document, lambda out: _show(out, counted, statistics, plot))


def _refuse(plot: Path, *, read: list[str], overwrite: bool) -> None:
    """Raise `UserError` for a figure that must not or cannot be written, before any work."""
    from memrewrite.cli.output_path import refuse
    from memrewrite.errors import UserError
    from memrewrite.output_target import Target
    from memrewrite.usage.plot import check_path

    check_path(plot)
    refuse(Target(plot, overwrite=overwrite, error=UserError), read=read)


def _show(out: Console, counted: TextUsage, statistics: UsageStatistics, plot: Path | None) -> None:
    from memrewrite.cli.text_output import line, table

    pieces = f"{counted.pieces:,} pieces of at most {counted.length:,} tokens" if counted.pieces else "the example inputs"
    line(out, f"{max(layer.tokens for layer in statistics.layers):,} tokens · {pieces}")
    spread = ("read", "at random", "never read", "KL reads", "KL weight", "top 1 % reads", "top 1 % weight")
    heads: tuple[str, ...] = ("layer", "kind", "pool", *spread, "entropy", "slots a head", "gate rms")
    table(out, heads, [_layer(layer) for layer in statistics.layers], right=heads[3:])
    if statistics.pools:
        line(out)
        heads = ("pool", "slots", "layers", *spread)
        table(out, heads, [_pool(pool) for pool in statistics.pools], right=heads[1:])
    overlaps = [(pool.pool, overlap) for pool in statistics.pools for overlap in pool.overlaps]
    if overlaps:
        line(out)
        rows = [(pool, *o.layers, percent(o.slots), percent(o.reads)) for pool, o in overlaps]
        heads = ("pool", "layer", "and layer", "common slots", "common reads")
        table(out, heads, rows, right=heads[3:])
    line(out, "\nKL (to uniform) and entropy in nats")
    if plot is not None:
        line(out, f"figure written to {plot}")


def _layer(layer: LayerUsage) -> tuple[str, ...]:
    slots = None if layer.effective_slots is None else f"{layer.effective_slots:.1f} of {layer.topk}"
    heads = (number(layer.entropy), slots or "–", number(layer.gate_rms))
    return (layer.layer, layer.kind, layer.pool, *_spread(layer), *heads)


def _pool(pool: PoolUsage) -> tuple[str, ...]:
    return (pool.pool, f"{pool.slots:,}", f"{len(pool.layers):,}", *_spread(pool))


def _spread(one: LayerUsage | PoolUsage) -> tuple[str, ...]:
    shares = (percent(one.share_read), percent(one.share_if_uniform), f"{one.slots_never_read:,}")
    return (*shares, number(one.kl_reads), number(one.kl_weight), percent(one.top_reads), percent(one.top_weight))


def percent(share: float | None) -> str:
    """A share in percent with three digits: `12.3 %`, `0.124 %`; `–` for None."""
    return "–" if share is None else f"{100 * share:.3g} %"


def number(value: float | None) -> str:
    """Three digits, or `–` for None."""
    return "–" if value is None else f"{value:.3g}"
