"""Draws charts with matplotlib: as SVG whose points are links with tooltips, and as PNG files."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lookahead_jax.eval.report.charts import AnyChart, Bars, Chart, Heat

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_GREY = "#8b909a"  # of axes, readable on light and on dark paper
_FILL = "#0f766e"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font and colour
    "svg.hashsalt": "lookahead",  # the same chart is the same file
    "text.parse_math": False,  # names are no formulas
    "font.size": 8,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "grid.color": _GREY,
    "grid.alpha": 0.3,
}


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError, saying what to install, without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the report's charts need matplotlib: pip install 'lookahead-jax[report]'"
        ) from None


class _Links:
    """Links of a drawing: matplotlib gets a placeholder, for which the SVG gets link and note."""

    def __init__(self) -> None:
        self.targets: list[tuple[str, str]] = []

    def add(self, href: str, note: str) -> str:
        self.targets.append((href, note))
        return f"link:{len(self.targets) - 1}"


def svg(chart: AnyChart) -> str:
    """The chart as an SVG element; every point or field is a link and has a tooltip."""
    import matplotlib
    from matplotlib.figure import Figure

    width, height, left = 4.4, 3.0, 0.42  # inches; automatic layout takes most of the time
    if isinstance(chart, Heat):
        height = 0.62 + 0.3 * len(chart.rows)
        left = 0.45 + 0.065 * max(map(len, chart.rows))
    links = _Links()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left / width, 0.52 / height, 1 - 0.1 / width, 1 - 0.1 / height)
        _draw(figure.subplots(), chart, links)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _linked(file.getvalue(), links, chart.title)


def save_png(path: Path, title: str, charts: Sequence[AnyChart]) -> None:
    """All charts of a section in one PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(charts))
    down = -(-len(charts) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * columns, 3.5 * down + 0.5), layout="constrained")
        axes = figure.subplots(down, columns, squeeze=False).ravel()
        for axis in axes[len(charts) :]:
            axis.set_axis_off()
        drawn: dict[str, Any] = {}
        for axis, chart in zip(axes, charts, strict=False):
            axis.set_title(chart.title, fontsize=9)
            drawn |= _draw(axis, chart, _Links())
        figure.suptitle(title, fontsize=11)
        if drawn:
            place = "outside lower center"
            columns = min(4, 2 * columns)
            figure.legend(list(drawn.values()), list(drawn), loc=place, ncols=columns, fontsize=8)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw(axis: Any, chart: AnyChart, links: _Links) -> dict[str, Any]:
    """Draws a chart; returns what a legend shows, by name."""
    axis.set_xlabel(chart.x_label)
    if isinstance(chart, Chart):
        return _draw_series(axis, chart, links)
    if isinstance(chart, Heat):
        _draw_heat(axis, chart, links)
    else:
        _draw_bars(axis, chart, links)
    return {}


def _draw_series(axis: Any, chart: Chart, links: _Links) -> dict[str, Any]:
    from matplotlib.transforms import ScaledTranslation

    if chart.log:
        axis.set_xscale("log", base=2)
    axis.set_ylim(-0.04, 1.04)
    axis.grid(axis="y")
    drawn: dict[str, Any] = {}
    for i, series in enumerate(chart.series):
        points, color = series.points, series.color
        if series.across and points:
            url = links.add(points[0].href, points[0].note)
            axis.axhspan(points[0].low, points[0].high, color=color, alpha=0.13, lw=0, url=url)
            drawn[series.label] = axis.axhline(
                points[0].y, color=color, linestyle="--", linewidth=1.2, url=url
            )
            continue
        # A small shift for each series keeps intervals at the same x apart.
        shift = ScaledTranslation(
            0.03 * (i - (len(chart.series) - 1) / 2), 0, axis.figure.dpi_scale_trans
        )
        place = axis.transData + shift
        x, y = [p.x for p in points], [p.y for p in points]
        lows = [p.x if p.x_low is None else p.x_low for p in points]
        highs = [p.x if p.x_high is None else p.x_high for p in points]
        axis.errorbar(
            x, y, fmt="none", ecolor=color, elinewidth=0.9, alpha=0.65, transform=place,
            xerr=[np.subtract(x, lows), np.subtract(highs, x)],
            yerr=[[p.y - p.low for p in points], [p.high - p.y for p in points]],
        )  # fmt: skip
        line = (0, (4, 2)) if series.dashed else "-"
        joined = []
        if series.joined:
            joined = axis.plot(x, y, color=color, linewidth=1.4, linestyle=line, transform=place)
        dots = axis.scatter(
            x, y, s=22, color="white" if series.dashed else color, edgecolors=color,
            marker=series.marker, zorder=3, transform=place,
            urls=[links.add(p.href, p.note) for p in points],
        )  # fmt: skip
        drawn[series.label] = (*joined, dots)
    _set_x_range(axis, chart)
    if chart.ticks is not None:
        axis.set_xticks(list(chart.ticks), [_number(tick) for tick in chart.ticks])
        axis.minorticks_off()
    return drawn


def _set_x_range(axis: Any, chart: Chart) -> None:
    """The range of all points and intervals: lines across a chart have no x of their own."""
    points = [p for series in chart.series if not series.across for p in series.points]
    ends = [x for p in points for x in (p.x, p.x_low, p.x_high) if x is not None]
    if not ends:
        return
    low, high = min(ends), max(ends)
    if chart.log:
        edge = max((high / low) ** 0.06, 1.1)
        axis.set_xlim(low / edge, high * edge)
    else:
        edge = 0.06 * (high - low) or 1.0
        axis.set_xlim(low - edge, high + edge)


def _draw_heat(axis: Any, heat: Heat, links: _Links) -> None:
    from matplotlib.patches import Rectangle

    axis.set_xlim(-0.5, max(len(heat.columns), 3) - 0.5)
    axis.set_ylim(len(heat.rows) - 0.5, -0.5)
    axis.set_xticks(range(len(heat.columns)), heat.columns)
    axis.set_yticks(range(len(heat.rows)), heat.rows)
    axis.set_ylabel(heat.y_label)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for i, row in enumerate(heat.fields):
        for j, field in enumerate(row):
            if field is None:
                axis.text(j, i, "–", ha="center", va="center")
                continue
            url, shade = links.add(field.href, field.note), 0.06 + 0.88 * field.value
            axis.add_patch(
                Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, facecolor=_FILL, alpha=shade, url=url)
            )
            ink = "white" if field.value > 0.55 else "black"
            axis.text(j, i, field.text, ha="center", va="center", color=ink, url=url)


def _draw_bars(axis: Any, bars: Bars, links: _Links) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for i, share in enumerate(bars.shares, 1):
        url = links.add(bars.href, f"{i}: {share:.1%} of the steps")
        axis.bar(i, share, width=0.9, color=bars.color, alpha=0.8, url=url)
    axis.set_xlim(0.4, max(len(bars.shares), 6) + 0.6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _number(x: float) -> str:
    """A short label of an axis."""
    return f"{x:g}" if abs(x) < 10_000 else f"{x / 1000:g}k"


def _linked(content: bytes, links: _Links, title: str) -> str:
    """matplotlib's SVG for the inside of a page: real links, tooltips, and no ids of its groups."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title}
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
        if "font-family" in parent.get("style", ""):  # the page has its own
            parent.attrib["style"] = re.sub(r"font-family: [^;]*;? ?", "", parent.attrib["style"])
        if re.fullmatch(r"[a-zA-Z]+[a-zA-Z0-9.]*_\d+", parent.get("id", "")):
            del parent.attrib["id"]  # such as axes_1, which every chart would have
        target = parent.get(f"{{{_XLINK}}}href", "")
        if target.startswith("link:"):
            href, note = links.targets[int(target.removeprefix("link:"))]
            parent.set(f"{{{_XLINK}}}href", href)
            del parent.attrib["target"]  # a link inside the page
            tooltip = ElementTree.Element(f"{{{_SVG}}}title")
            tooltip.text = note
            parent.insert(0, tooltip)
    return ElementTree.tostring(root, encoding="unicode")
