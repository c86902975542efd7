"""How charts look, and how one drawing becomes an SVG that follows the page and a PNG on white.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; every series has a
marker of its own too. In the SVG each colour is a variable of the page's style, with a lighter
value where the reader's page is dark. Needs matplotlib (extra `[report]`).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ..errors import RefusedError

INK, MUTED, GRID = "#1c2024", "#5b636c", "#d5d9de"
# For a series: a colour, its name on the page, its value on a dark page, and its marker.
SERIES = (
    ("#56616d", "--dense", "#aab4bf", "o"),
    ("#0072b2", "--sparse", "#56b4e9", "s"),
    ("#d55e00", "--joint", "#ff8f3f", "D"),
    ("#009e73", "--coded", "#2fd3a0", "^"),
    ("#a8588a", "--other", "#dd97c0", "v"),
    ("#a87b00", "--another", "#f0c53a", "P"),
)
FORMATS = {"dense": "dense", "sparse24": "2:4", "sparse24_int4": "2:4+int4", "int4": "int4"}
_PLACES = {"dense": 0, "2:4": 1, "2:4+int4": 2, "int4": 3}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{color: name for color, name, _, _ in SERIES},
}
_DARK = {INK: "#e8eaed", MUTED: "#a6aeb8", GRID: "#3a4149"}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONTS = "DejaVu Sans, Verdana, sans-serif"
_MAX_LABEL = 32


@dataclass(frozen=True)
class Style:
    """Colour and marker of one series."""

    color: str
    marker: str


@dataclass(frozen=True)
class Picture:
    """A finished chart: an `<svg>` element to be put into a page, and the bytes of a PNG."""

    svg: str
    png: bytes


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """The same for a format in every chart; labels that are no format take what is left."""
    free = list(range(len(_PLACES), len(SERIES)))
    found = {}
    for label in dict.fromkeys(labels):
        # Past the last colour they repeat; every point and line has its name beside it.
        place = _PLACES[label] if label in _PLACES else free[0]
        free = free if label in _PLACES else [*free[1:], free[0]]
        color, _, _, marker = SERIES[place]
        found[label] = Style(color, marker)
    return found


def format_name(kind: str) -> str:
    """What people call a format."""
    return short(FORMATS.get(kind, kind))


def short(text: str) -> str:
    """A name as a chart can hold it: one line, no control characters, cut with an ellipsis."""
    clean = printable(text)
    return clean if len(clean) <= _MAX_LABEL else clean[: _MAX_LABEL - 1] + "…"


def printable(text: str) -> str:
    """The text with a sign for each character that has no shape, which XML may not even hold."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def css_variables() -> tuple[str, str]:
    """Declarations of all colours, for a light page and for a dark one."""
    light = {name: color for color, name in _VARIABLES.items()}
    dark = {_VARIABLES[color]: value for color, value in _DARK.items()}
    dark.update({name: value for _, name, value, _ in SERIES})
    return _declared(light), _declared(dark)


def _declared(values: dict[str, str]) -> str:
    return " ".join(f"{name}: {value};" for name, value in values.items())


def need_matplotlib() -> None:
    """Raise RefusedError, with the way on, unless charts can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RefusedError(
            "a report needs matplotlib, which is not installed", "pip install 'halfweave[report]'"
        ) from error


@contextmanager
def drawing() -> Iterator[None]:
    """Our settings of matplotlib's, for as long as charts are drawn."""
    import matplotlib

    settings: dict[str, Any] = {
        "font.family": "sans-serif",
        "font.size": 11.0,
        "axes.titlesize": 12.0,
        "axes.titlelocation": "left",
        "axes.titlepad": 10.0,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "text.parse_math": False,  # names are not formulas
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.12,
        "figure.constrained_layout.w_pad": 0.1,
        "savefig.transparent": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "halfweave",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The PNG's font lacks some scripts; the page is shown in the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def axes_grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure of so many charts, each of `size` inches, and these in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(columns * width, rows * height))
    FigureCanvasAgg(figure)  # measures text
    cells = figure.subplots(rows, columns, squeeze=False)
    return figure, list(cells.flat)


def from_zero(axes: Any, x: bool = True, y: bool = True, room: float = 1.12) -> None:
    """Let axes begin at 0, with some room beyond the largest value that is drawn."""
    for wanted, limits, setter in (
        (x, axes.get_xlim, axes.set_xlim),
        (y, axes.get_ylim, axes.set_ylim),
    ):
        if wanted:
            setter(0, max(limits()[1], 1e-9) * room)


def finish(figure: Any, name: str, title: str, description: str) -> Picture:
    """Turn a figure into a picture; `name` keeps its ids apart from those of others on a page."""
    vector, raster = io.BytesIO(), io.BytesIO()
    figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(raster, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Picture(_embedded(vector.getvalue(), name, title, description), raster.getvalue())


def _embedded(source: bytes, name: str, title: str, description: str) -> str:
    """The SVG as part of a page: sized by it, in its colours, named for those who do not see it."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(source)
    for found in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(found)
    for element in root.iter():
        _adopt(element, name)
    for given in ("width", "height", "version"):
        root.attrib.pop(given, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = printable(text)
        root.insert(at, element)
    return ElementTree.tostring(root, encoding="unicode")


def _adopt(element: ElementTree.Element, name: str) -> None:
    """One element: ids and references get the chart's name, known colours become variables."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif key in ("style", "clip-path", "fill", "stroke"):
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
            value = re.sub(r"font: ([^;]*?px) [^;]*", rf"font: \1 {_FONTS}", value)
            for color, variable in _VARIABLES.items():
                value = value.replace(color, f"var({variable})")
            element.set(key, value)
