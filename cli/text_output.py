"""Prints results as text: rich tables on a terminal, aligned plain text elsewhere; no cell is truncated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from memrewrite.cost import Cost
    from memrewrite.passes.onnx.check.check import Checked
    from memrewrite.passes.onnx.check.routes import Compared
    from memrewrite.passes.onnx.export import Exported
    from memrewrite.passes.onnx.file import Port
    from memrewrite.phases import Phase
    from memrewrite.plans import Plan, Substitution
    from memrewrite.report import LayerScale, Report
    from memrewrite.site import Inspection, Site

Row = Sequence[str]
EDITED = {"graph": "as a graph of its block", "span": "between modules", "module": "as a module"}
SHORT = 32  # a cell of so many characters is not broken
STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def show_inspection(out: Console, inspection: Inspection, page: Path | None = None) -> None:
    """Print sites and near misses, and the path of the HTML page."""
    line(out, f"{len(inspection.sites)} MLPs · captured: {inspection.captured}")
    show_sites(out, inspection.sites)
    if inspection.near_misses:
        line(out, f"\n{len(inspection.near_misses)} near misses")
        rows = [(m.path or "(root)", m.reason, m.source or m.node) for m in inspection.near_misses]
        table(out, ("path", "refused because", "at"), rows)
    if page is not None:
        line(out, f"\npage written to {page}")


def show_sites(out: Console, found: Sequence[Site]) -> None:
    """Print a table of MLPs, one row each."""
    if found:
        heads = ("path", "pattern", "widths", "activation", "calls", "block", "edited")
        table(out, heads, [_site(site) for site in found], right=("calls",), less=("calls", "block", "activation"))


def _site(site: Site) -> Row:
    widths = f"{site.d_in:,} → {site.d_hidden:,} → {site.d_model:,}"
    block = "" if site.block is None else f"{site.tower}[{site.block}]"
    return (site.path or "(root)", site.pattern, widths, site.activation, f"{site.calls:,}", block, edited(site))


def edited(site: Site) -> str:
    """How the site is edited, in words."""
    reasons = [b.why for b in site.bindings if b.kind == "none"]
    if reasons:
        return f"in the graph only: {reasons[0]}"
    kinds = {b.kind for b in site.bindings}
    return next((words for kind, words in EDITED.items() if kind in kinds), ", ".join(sorted(kinds)))


def show_plan(out: Console, plan: Plan, scales: Sequence[LayerScale] = ()) -> None:
    """Print site → layer with its cost, the pools, how large the layers start, and the totals."""
    frozen = " · trained: the memory only" if plan.train == "memory_only" else ""
    line(out, f"{len(plan.substitutions)} MLPs to rewrite · captured: {plan.captured}{frozen}")
    heads: Row = ("path", "pattern", "layer", "parameters", "stored", "FLOPs/token", "read/token")
    table(out, heads, [_substitution(s, plan) for s in plan.substitutions], right=heads[3:], less=("pattern", *heads[6:3:-1]))
    if plan.pools:
        line(out)
        heads = ("pool", "keys", "slots", "width", "dtype", "parameters", "stored", "layers")
        table(
            out, heads, [_pool(plan, name) for name in plan.pools], right=("keys", "slots", *heads[5:]), less=("slots", "dtype")
        )
    line(out)
    if scales:
        heads = ("output at the start (rms)", "stream", "MLP", "layer", "layer / MLP", "")
        table(out, heads, [_scale(scale) for scale in scales], right=heads[1:5], less=("stream",))
        line(out)
    _totals(out, plan.before(), plan.after())


def _substitution(substitution: Substitution, plan: Plan) -> Row:
    site, old, new = substitution.site, substitution.site.cost(), substitution.cost(plan.pools)
    layer = f"{substitution.kind} ({substitution.placement})" + (f" → {substitution.pool}" if substitution.pool else "")
    calls = site.calls
    return (
        site.path or "(root)",
        site.pattern,
        layer,
        f"{old.parameters:,} → {new.parameters:,}",
        f"{size(old.parameter_bytes)} → {size(new.parameter_bytes)}",
        f"{old.flops * calls:,} → {new.flops * calls:,}",
        f"{size(old.bytes_read * calls)} → {size(new.bytes_read * calls)}",
    )


def _scale(scale: LayerScale) -> Row:
    ratio = scale.layer / scale.mlp if scale.layer is not None and scale.mlp else None
    numbers = ["" if value is None else f"{value:.3g}" for value in (scale.stream, scale.mlp, scale.layer, ratio)]
    return (scale.path or "(root)", *numbers, scale.remark)


def _pool(plan: Plan, name: str) -> Row:
    spec, cost = plan.pools[name], plan.pools[name].cost()
    layers = sum(s.pool == name for s in plan.substitutions)
    dtype = spec.dtype or "as the model"
    width = " + ".join(f"{width:,}" for width in spec.widths)
    numbers = (f"{spec.keys:,}", f"{spec.slots:,}", width, dtype, f"{cost.parameters:,}")
    return (name, *numbers, size(cost.parameter_bytes), f"{layers:,}")


def _totals(out: Console, before: Cost, after: Cost) -> None:
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", _times(before.parameters, after.parameters)),
        _bytes("stored", before.parameter_bytes, after.parameter_bytes),
        ("FLOPs per token", f"{before.flops:,}", f"{after.flops:,}", _times(before.flops, after.flops)),
        _bytes("read per token", before.bytes_read, after.bytes_read),
    ]
    heads = ("of these MLPs", "before", "after", "change")
    table(out, heads, rows, right=heads[1:])


def _bytes(name: str, before: int, after: int) -> Row:
    return (name, size(before), size(after), _times(before, after))


def show_report(out: Console, report: Report, saved: Path | None, phases: Sequence[Phase] = ()) -> None:
    """Print the plan, the checks, how long `phases` took, the totals, and where the result was saved."""
    show_plan(out, report.plan, report.scales)
    line(out)
    show_checks(out, report)
    if phases:
        line(out)
        show_phases(out, phases)
    before, after = report.parameters_before, report.parameters_after
    line(out, f"\nwhole model: {before:,} → {after:,} parameters ({_times(before, after)}), in {report.seconds:.1f} s")
    line(out, f"saved in {saved}" if saved else "not saved: use -o DIR to save the result")


def show_phases(out: Console, phases: Sequence[Phase]) -> None:
    """Print how long each phase took, and their sum."""
    times = [(phase.name, phase.seconds, phase.cpu_seconds) for phase in phases]
    times.append(("sum", sum(phase.seconds for phase in phases), sum(phase.cpu_seconds for phase in phases)))
    rows = [(name, f"{seconds:.2f} s", f"{processor:.2f} s") for name, seconds, processor in times]
    table(out, ("phase", "clock", "processor"), rows, right=("clock", "processor"))


def show_verification(out: Console, report: Report, directory: Path) -> None:
    """Print the checks of a saved result."""
    show_checks(out, report)
    line(out, f"\n{directory} is unchanged since it was saved")


def show_checks(out: Console, report: Report) -> None:
    """Print every check: outcome, number and sentence."""
    if not report.checks:
        line(out, "no checks were run: the recipe has `verify: off`")
        return
    rows = [(c.name, c.outcome, _number(c.number), c.sentence) for c in report.checks]
    table(out, ("check", "outcome", "number", ""), rows, right=("number",))


def show_export(out: Console, export: Exported) -> None:
    """Print the inputs and outputs of an exported file, the form of its memory operators, and its path."""
    rows = [(what, port.name, port.dtype, " × ".join(map(str, port.shape))) for what, ports in _ports(export) for port in ports]
    table(out, ("", "name", "type", "axes"), rows)
    nodes = ", ".join(f"{count} {name}" for name, count in export.nodes.items()) or "as standard operators"
    line(out, f"\nmemory operators: {nodes} · {export.dtype} · opset {export.opset} · {size(export.weights)} of weights")
    line(out, f"saved in {export.path}" + (f", weights in {export.data}" if export.data else ""))


def _ports(export: Exported) -> tuple[tuple[str, Sequence[Port]], ...]:
    return (("input", export.inputs), ("output", export.outputs))


def show_onnx_check(out: Console, result: Checked) -> None:
    """Print the largest differences of every route's outputs, differing top-k choices, and the inputs that were tried."""
    for route in result.routes:
        if route.skipped:
            line(out, f"{route.name}: not run: {route.skipped}\n")
            continue
        kernels = ", ".join(f"{name} {how}" for name, how in route.kernels.items()) or "no memory operators"
        line(out, f"{route.name} on {result.provider}: {kernels}")
        heads = ("output", "outcome", "largest difference", "relative", "at")
        table(out, heads, [_compared(output) for output in route.outputs], right=heads[2:4])
        ties = route.ties
        if ties.differing:
            judgement = (
                f"{ties.wrong:,} of them wrong" if ties.wrong else f"equally good within {ties.gap:.2%} of the tolerance"
            )
            line(out, f"{ties.differing:,} of {ties.rows:,} top-ks chose other slots, {judgement}")
        for failure in route.failures:
            line(out, f"failed: {failure}")
        line(out)
    rows = [(d.name, ", ".join(f"{name} {n}" for name, n in d.lengths.items()), d.skipped or "run") for d in result.draws]
    table(out, ("inputs", "lengths", ""), rows)
    line(out, f"\ntolerance {result.tolerance:g}, {result.dtype}; in {result.seconds:.1f} s")


def _compared(output: Compared) -> Row:
    outcome = "passed" if output.ok else "failed"
    misplaced = f", {output.misplaced:,} misplaced" if output.misplaced else ""
    return (output.name, outcome, f"{output.difference:.1e}", f"{output.relative:.1e}{misplaced}", output.draw)


def show_recipes(out: Console, described: Mapping[str, str]) -> None:
    """Print recipes and their descriptions."""
    table(out, ("recipe", "description"), list(described.items()))


def size(count: int) -> str:
    """A number of bytes with a unit: `1.5 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def _times(before: int, after: int) -> str:
    return f"×{after / before:.3g}" if before else "new"


def line(out: Console, text: str = "") -> None:
    """Print a line without wrapping or truncating it."""
    out.print(text, soft_wrap=True)


def table(out: Console, heads: Row, rows: Sequence[Row], right: Sequence[str] = (), less: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` are right-aligned.

    On a terminal the first column, which has names that users copy, is never wrapped. Where the table is wider than the
    terminal, the columns named in `less` are left out, the first of them first, and a line says which.
    """
    if not out.is_terminal:
        _plain(out, heads, rows, right)
        return
    left_out: list[str] = []
    while _least_width(heads, rows, left_out) > out.width and len(left_out) < len(less):
        left_out.append(less[len(left_out)])
    shown = [i for i, head in enumerate(heads) if head not in left_out]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        justify: Literal["left", "right"] = "right" if heads[i] in right else "left"
        drawn.add_column(heads[i], justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        drawn.add_row(*(Text(row[i], style=STYLES.get(row[i], "")) for i in shown))
    width = max(out.width, _least_width(heads, rows, left_out))
    for printed in out.render_lines(drawn, out.options.update(width=width), pad=False):
        out.print(Segments([*printed, Segment.line()]), soft_wrap=True, end="")
    if left_out:
        line(out, f"left out at this width: {', '.join(left_out)}")


def _plain(out: Console, heads: Row, rows: Sequence[Row], right: Sequence[str]) -> None:
    """Aligned text, for files and other programs: nothing is wrapped or left out."""
    widths = [max(cell_len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = [_padded(row[i], widths[i], heads[i] in right) for i in range(len(heads))]
        line(out, "  ".join(cells).rstrip())


def _least_width(heads: Row, rows: Sequence[Row], left_out: Sequence[str]) -> int:
    """The width at which the first column is whole, and the others are broken between words only."""
    widths = []
    for i, head in enumerate(heads):
        if head not in left_out:
            cells = [row[i] for row in (heads, *rows)]
            parts = cells if i == 0 else [part for cell in cells for part in _unbroken(cell)]
            widths.append(max(map(cell_len, parts), default=0))
    return sum(widths) + 3 * len(widths)  # with the space around columns


def _unbroken(cell: str) -> list[str]:
    """The parts of a cell that should stay on one line: the words of a sentence; all of a short cell, such as numbers."""
    return [cell] if cell_len(cell) <= SHORT else cell.split()


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space
