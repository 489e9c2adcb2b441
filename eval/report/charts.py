"""Charts as data, drawn twice: as SVG for the page, and by matplotlib for PNG files."""

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PALETTE = (
    "#0f766e", "#c2410c", "#4338ca", "#a16207", "#be185d", "#15803d", "#0369a1", "#7c3aed",
    "#b91c1c", "#4d7c0f", "#0e7490", "#9d174d",
)  # fmt: skip
REFERENCE = "#6b7280"  # of what is drawn as a line across the chart


class Point(NamedTuple):
    """A mean with its 95 % interval, and the cells that it is made of."""

    x: float
    y: float
    low: float
    high: float
    href: str
    note: str  # shown when pointed at
    x_low: float | None = None
    x_high: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """Points of one kind, in the order of x."""

    label: str
    color: str
    points: Sequence[Point]
    joined: bool = True
    across: bool = False  # one value, whatever x is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common x; y is a share."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log: bool = False
    ticks: Sequence[float] | None = None


class HeatCell(NamedTuple):
    """One field of a heat map."""

    value: float
    text: str
    href: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heat:
    """Fields [rows][columns]; None where nothing was measured."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    fields: Sequence[Sequence[HeatCell | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """Shares of whole numbers from 1 on."""

    title: str
    x_label: str
    shares: Sequence[float]
    color: str
    href: str


W, H = 340, 236
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 12, 40


class _Scale:
    """x values -> pixels."""

    def __init__(self, chart: Chart):
        xs = [x for line in chart.lines if not line.across for p in line.points for x in _span(p)]
        self._log = chart.log
        low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
        if self._log:
            low, high = math.log(max(low, 1e-9)), math.log(max(high, 1e-9))
        pad = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
        self.low, self.high = low - pad, high + pad

    def __call__(self, x: float | int) -> float:
        x = math.log(max(x, 1e-9)) if self._log else x
        return LEFT + (x - self.low) / (self.high - self.low) * (W - LEFT - RIGHT)

    def ticks(self) -> list[float]:
        """About five round values (of a linear scale)."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(k for k in (1, 2, 5, 10) if (self.high - self.low) / (k * step) <= 6)
        first = math.ceil(self.low / step)
        return [float(i * step) for i in range(first, math.floor(self.high / step) + 1)]


def _span(point: Point) -> tuple[float, ...]:
    return tuple(float(x) for x in (point.x, point.x_low, point.x_high) if x is not None)


def _y(share: float | int) -> float:
    return float(H - BOTTOM - share * (H - TOP - BOTTOM))


def number(x: float | int) -> str:
    """Short, for axes."""
    return f"{x:g}" if abs(x) < 10_000 else f"{x / 1000:g}k"


def chart_svg(chart: Chart) -> str:
    """A chart as an SVG element; every point is a link to its rows."""
    scale = _Scale(chart)
    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(chart.title)}">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{tick:g}</text>')
    for tick in scale.ticks() if chart.ticks is None else chart.ticks:
        x, y = scale(tick), H - BOTTOM
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>')
        label = number(round(tick, 10))
        parts.append(f'<text x="{x:.1f}" y="{y + 15}" text-anchor="middle">{label}</text>')
    middle = (LEFT + W - RIGHT) / 2
    label = html.escape(chart.x_label)
    parts.append(f'<text class="axis" x="{middle}" y="{H - 6}" text-anchor="middle">{label}</text>')
    count = len(chart.lines)
    for i, line in enumerate(chart.lines):
        shift = 0.0 if line.across else 2.2 * (i - (count - 1) / 2)  # so that intervals stay apart
        parts += _line_svg(line, scale, shift)
    return "".join([*parts, "</svg>"])


def _line_svg(line: Line, scale: _Scale, shift: float) -> list[str]:
    color, parts = line.color, []
    if line.across and line.points:
        p = line.points[0]
        top, bottom = _y(p.high), _y(p.low)
        parts.append(
            f'<a href="{p.href}"><title>{html.escape(p.note)}</title><rect x="{LEFT}" '
            f'y="{top:.1f}" width="{W - LEFT - RIGHT}" height="{max(bottom - top, 1):.1f}" '
            f'fill="{color}" opacity="0.13"/><line x1="{LEFT}" x2="{W - RIGHT}" '
            f'y1="{_y(p.y):.1f}" y2="{_y(p.y):.1f}" stroke="{color}" stroke-dasharray="5 4"/></a>'
        )
        return parts
    if line.joined and len(line.points) > 1:
        path = " ".join(f"{scale(p.x) + shift:.1f},{_y(p.y):.1f}" for p in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    for p in line.points:
        x, y = scale(p.x) + shift, _y(p.y)
        bars = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(p.low):.1f}" y2="{_y(p.high):.1f}"/>'
        if p.x_low is not None and p.x_high is not None:
            a, b = scale(p.x_low) + shift, scale(p.x_high) + shift
            bars += f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        parts.append(
            f'<a href="{p.href}"><title>{html.escape(p.note)}</title>'
            f'<g stroke="{color}" stroke-width="1.1" opacity="0.65">{bars}</g>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{color}"/></a>'
        )
    return parts


def heat_svg(heat: Heat) -> str:
    """A heat map as an SVG element."""
    left, top, wide, tall = 92, 8, 58, 24
    width, height = left + wide * max(len(heat.columns), 3), top + tall * len(heat.rows) + 42
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{html.escape(heat.title)}">'
    ]
    for i, (name, fields) in enumerate(zip(heat.rows, heat.fields, strict=True)):
        y = top + i * tall
        parts.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>'
        )
        for j, field in enumerate(fields):
            x = left + j * wide
            if field is None:
                parts.append(f'<text x="{x + wide / 2}" y="{y + 16}" text-anchor="middle">–</text>')
                continue
            ink = "#fff" if field.value > 0.55 else "var(--ink)"
            parts.append(
                f'<a href="{field.href}"><title>{html.escape(field.note)}</title>'
                f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{tall - 2}" rx="3" '
                f'fill="#0f766e" fill-opacity="{0.06 + 0.88 * field.value:.3f}"/>'
                f'<text x="{x + wide / 2}" y="{y + 16}" text-anchor="middle" '
                f'style="fill:{ink}">{html.escape(field.text)}</text></a>'
            )
    y = top + tall * len(heat.rows) + 14
    for j, name in enumerate(heat.columns):
        x = left + (j + 0.5) * wide
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{html.escape(name)}</text>')
    label = html.escape(f"{heat.x_label} across, {heat.y_label} down")
    parts.append(f'<text class="axis" x="{left}" y="{y + 18}">{label}</text>')
    return "".join([*parts, "</svg>"])


def bars_svg(bars: Bars) -> str:
    """A histogram as an SVG element."""
    most = max(bars.shares, default=0.0) or 1.0
    step = (W - LEFT - RIGHT) / max(len(bars.shares), 6)
    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(bars.title)}">']
    for i, share in enumerate(bars.shares):
        x, top = LEFT + i * step, _y(share / most)
        parts.append(
            f'<a href="{bars.href}"><title>{i + 1}: {share:.1%} of the steps</title>'
            f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{step - 2:.1f}" '
            f'height="{H - BOTTOM - top:.1f}" fill="{bars.color}" opacity="0.8"/></a>'
        )
        if len(bars.shares) <= 16 or i % 4 == 0:
            y = H - BOTTOM + 15
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{y}" text-anchor="middle">{i + 1}</text>'
            )
    parts.append(f'<text x="{LEFT - 6}" y="{_y(1) + 4}" text-anchor="end">{most:.0%}</text>')
    middle, label = (LEFT + W - RIGHT) / 2, html.escape(bars.x_label)
    parts.append(f'<text class="axis" x="{middle}" y="{H - 6}" text-anchor="middle">{label}</text>')
    return "".join([*parts, "</svg>"])


def save_png(path: Path, title: str, charts: Sequence[Chart | Heat | Bars]) -> None:
    """All charts of a group in one PNG file. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(charts))
    down = -(-len(charts) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, columns, squeeze=False).ravel()
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    seen: dict[str, Any] = {}
    for axis, chart in zip(axes, charts, strict=False):
        axis.set_title(chart.title, fontsize=9)
        axis.set_xlabel(chart.x_label, fontsize=8)
        axis.tick_params(labelsize=8)
        if isinstance(chart, Chart):
            _draw_lines(axis, chart, seen)
        elif isinstance(chart, Heat):
            _draw_heat(axis, chart)
        else:
            axis.bar(range(1, len(chart.shares) + 1), chart.shares, color=chart.color)
    figure.suptitle(title, fontsize=11)
    if seen:
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_lines(axis: Any, chart: Chart, seen: dict[str, Any]) -> None:
    for line in chart.lines:
        p = line.points
        if line.across and p:
            seen[line.label] = axis.axhline(p[0].y, color=line.color, linestyle="--", linewidth=1)
            axis.axhspan(p[0].low, p[0].high, color=line.color, alpha=0.12)
            continue
        y = [q.y for q in p]
        across = [[q.x - q.x_low for q in p], [q.x_high - q.x for q in p]] if all(
            q.x_low is not None and q.x_high is not None for q in p
        ) else None  # fmt: skip
        seen[line.label] = axis.errorbar(
            [q.x for q in p], y, xerr=across,
            yerr=[[q.y - q.low for q in p], [q.high - q.y for q in p]],
            color=line.color, fmt="o-" if line.joined else "o", markersize=4, linewidth=1.2,
            elinewidth=0.8, capsize=2,
        )  # fmt: skip
    if chart.log:
        axis.set_xscale("log", base=2)
    if chart.ticks is not None:
        axis.set_xticks(list(chart.ticks), [number(t) for t in chart.ticks])
        axis.minorticks_off()
    axis.set_ylim(-0.04, 1.04)
    axis.grid(axis="y", alpha=0.25)


def _draw_heat(axis: Any, heat: Heat) -> None:
    values = [[math.nan if f is None else f.value for f in row] for row in heat.fields]
    axis.imshow(values, vmin=0, vmax=1, cmap="GnBu", aspect="auto")
    axis.set_xticks(range(len(heat.columns)), heat.columns)
    axis.set_yticks(range(len(heat.rows)), heat.rows)
    axis.set_ylabel(heat.y_label, fontsize=8)
    for i, row in enumerate(heat.fields):
        for j, field in enumerate(row):
            if field is not None:
                ink = "white" if field.value > 0.6 else "black"
                axis.text(j, i, field.text, ha="center", va="center", fontsize=7, color=ink)
