"""The page of an audit, one HTML file: weights and their sums, errors by the ring's size, and what is wrong."""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import Any

from ringcore.errors import MissingDependency
from ringcore.testing.auditing import Audit
from ringcore.testing.diagnosis import NAMES

_LEAST, _MOST = 1e-17, 1e3  # errors that are drawn: those of NaN are infinite

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }}
svg {{ max-width: 100%; height: auto }}
td, th {{ padding: 0 1em 0 0; text-align: left }} td {{ font-family: monospace }}
.right {{ color: #17692a }} .wrong {{ color: #a01616 }}
</style>
<h1>{title}</h1>
<p>{asked}</p>
{verdict}
{picture}
<table><tr><th>question</th><th>result</th>{sizes}</tr>
{rows}
</table>
</html>
"""


def check_drawing() -> None:
    """Raises MissingDependency if no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency('--html draws with matplotlib: pip install "ringcore[report]".') from error


def page(found: Audit) -> str:
    """The whole page; it needs no other file."""
    spec, report = found.spec, found.report
    verdict = "".join(f"<li>{escape(line)}</li>\n" for line in str(report).splitlines())
    rows = []
    for question, result in dict.fromkeys((question, result) for question, _, result in report.errors):
        errors = (report.errors.get((question, size, result)) for size in spec.ring_sizes)
        cells = "".join(f"<td>{'no answer' if error is None else f'{error:.1e}'}</td>" for error in errors)
        rows.append(f"<tr><td>{escape(question)}</td><td>{result}</td>{cells}</tr>")
    return _PAGE.format(
        title=f"Audit of {escape(spec.target)}",
        asked=escape(
            f"Asked by signature {spec.signature}, launcher {spec.launcher}, in {spec.dtype}: "
            f"{report.asked} answers about {spec.length} positions."
        ),
        verdict=f'<ul class="{"right" if report.right else "wrong"}">\n{verdict}</ul>',
        picture=_picture(found) if report.errors else "",
        sizes="".join(f"<th>ring of {size}</th>" for size in spec.ring_sizes),
        rows="\n".join(rows),
    )


def _picture(found: Audit) -> str:
    """SVG: sums of weights and largest errors by ring size, and the weights of the first head that were read off."""
    from matplotlib.figure import Figure

    weights = found.report.weights
    figure = Figure(figsize=(11, 7.2 if weights else 3.6), layout="constrained")
    parts = figure.subfigures(2 if weights else 1, 1, squeeze=False)[:, 0]
    left, right = parts[0].subplots(1, 2)
    _draw_sums(left, found)
    _draw_errors(right, found)
    if weights:
        _draw_weights(parts[1], found)
    drawing = StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue().partition("<svg")[1] + drawing.getvalue().partition("<svg")[2]


def _draw_sums(axes: Any, found: Audit) -> None:
    sums = found.report.sums
    sizes = sorted(sums)
    if sizes:
        drawn = axes.imshow(
            [sums[size] for size in sizes], aspect="auto", vmin=0, vmax=2, cmap="RdBu", interpolation="nearest"
        )
        axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
        axes.figure.colorbar(drawn, ax=axes, extend="max", label="sum of weights, due is 1")
    axes.set(title="The sum of each row's weights", xlabel="row of out, head by head", ylabel="ring size")


def _draw_errors(axes: Any, found: Audit) -> None:
    errors = found.report.errors
    for name in NAMES:
        asked = sorted({size for _, size, result in errors if result == name})
        worst = [
            max(error for (_, size, result), error in errors.items() if (size, result) == (at, name)) for at in asked
        ]
        if asked:
            axes.plot(asked, [min(max(error, _LEAST), _MOST) for error in worst], marker="o", label=name)
    axes.set_xticks(found.spec.ring_sizes)
    axes.set(
        title="The largest error",
        xlabel="ring size",
        ylabel=f"over the largest number due, up to {_MOST:g}",
        yscale="log",
    )
    axes.legend()


def _draw_weights(figure: Any, found: Audit) -> None:
    due, came = found.report.due_weights, found.report.weights
    drawn = {**({} if due is None else {"due": due}), **{f"ring of {size}": x for size, x in came.items()}}
    for axes, (name, weights) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        axes.imshow(weights[0], vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        axes.set(title=f"Weights, {name}", xlabel="key", ylabel="query")
