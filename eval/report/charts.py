"""Charts as data: lines, heat maps and histograms of scores. drawing.py draws them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

PALETTE = (
    "#0f766e", "#c2410c", "#4338ca", "#a16207", "#be185d", "#15803d", "#0369a1", "#7c3aed",
    "#b91c1c", "#4d7c0f", "#0e7490", "#9d174d", "#1e3a8a", "#78350f", "#581c87", "#064e3b",
    "#ea580c", "#0891b2", "#65a30d", "#db2777",
)  # fmt: skip
REFERENCE = "#6b7280"  # of the full cache, a line across the chart


class Point(NamedTuple):
    """A mean with its 95 % interval, and a link to the rows behind it."""

    x: float
    y: float
    low: float
    high: float
    href: str
    note: str  # its tooltip
    x_low: float | None = None
    x_high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """The points of one policy, in the order of x."""

    label: str
    color: str
    points: Sequence[Point]
    joined: bool = True
    across: bool = False  # a single value that does not depend on x: a line across the chart
    marker: str = "o"  # as matplotlib names it
    dashed: bool = False  # a dashed line with hollow markers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over a common x; y is a share."""

    title: str
    x_label: str
    series: Sequence[Series]
    log: bool = False  # the scale of x
    ticks: Sequence[float] | None = None  # of x; None: chosen automatically


class HeatCell(NamedTuple):
    """One field of a heat map."""

    value: float
    text: str
    href: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heat:
    """A heat map: fields [rows][columns]; None where nothing was measured."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    fields: Sequence[Sequence[HeatCell | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """A histogram: the shares of 1, 2, 3, ..."""

    title: str
    x_label: str
    shares: Sequence[float]
    color: str
    href: str


AnyChart = Chart | Heat | Bars
