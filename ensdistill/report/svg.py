"""Small figures as SVG that takes the page's colours and typeface: matplotlib draws, the page's style decides.

Colours are drawn as marks that stand for CSS variables and are replaced in the text, so that one figure serves light
and dark. Text stays text. A figure is a panel of 360 × 240 points: a phone shows one a row at about its own size.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import escape

from markupsafe import Markup

from ensdistill.report.group import Group

WIDTH, HEIGHT = 5.0, 3.33
"""Inches of a panel, at 72 points each."""
_NUMBERS, _LETTER, _EDGE = 40, 5.9, 0.14
"""Points that numbers take at the vertical axis, and a letter of a name; inches at the other edges."""
_VARIABLES = ("ink", "soft", "rule", "paper", "c1", "c2", "c3", "c4", "c5", "c6", "c7")
MARK = {name: f"#0{number:x}0d0c" for number, name in enumerate(_VARIABLES, start=1)}
"""Colour that stands for each variable of the page's style."""
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), "solid", (0, (3, 1.5)), (0, (2, 2)))
SYMBOLS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
GLYPHS = dict(zip(SYMBOLS, "●■▲◆▼✚✖◀▶⬟⬢★", strict=True))
"""Each symbol as a letter."""
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MARK["rule"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MARK["soft"],
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "grid.color": MARK["rule"],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": MARK["ink"],
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": MARK["rule"],
    "xtick.labelcolor": MARK["soft"],
    "xtick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.color": MARK["rule"],
    "ytick.labelcolor": MARK["soft"],
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
}


class Drawn(NamedTuple):
    """A panel that is drawn."""

    title: str
    """What it shows."""
    svg: Markup
    """The element."""


class Panel:
    """One figure in the making: `with Panel(…) as panel`, draw on `panel.axes`, then `panel.svg()`.

    Args:
        prefix: begin of its ids, which no other figure of the page has.
        title: what it shows, which the page says above it.
        text: what somebody who does not see it should know.
        height: inches, where it is not the usual one.
        labels: names at its vertical axis, where those are no numbers.
        bottom: points below its axes.
    """

    def __init__(
        self, prefix: str, title: str, text: str, *, height: float, labels: Sequence[str] = (), bottom: float = 38
    ) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        self._prefix, self._title, self._text = prefix, plain(title), plain(text, 1000)
        self._context = rc_context(_STYLE)
        with rc_context(_STYLE):
            self._figure = Figure(figsize=(WIDTH, height))
            self.axes: Any = self._figure.add_subplot()
        # by hand: a layout that measures every text takes twice as long as all the rest
        left = 8 + _LETTER * max(map(len, labels)) if labels else _NUMBERS
        edges = left / WIDTH, bottom / height, 1 - _EDGE / WIDTH, 1 - _EDGE / height
        self.axes.set_position((edges[0] / 72, edges[1] / 72, edges[2] - edges[0] / 72, edges[3] - edges[1] / 72))

    def __enter__(self) -> Panel:
        self._context.__enter__()
        self.axes.tick_params(axis="y", pad=2)
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def drawn(self) -> Drawn:
        """The figure as an element of a page, with ids of its own."""
        from matplotlib import rc_context

        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with rc_context(_STYLE | {"svg.hashsalt": "report"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that its typeface lacks: the page's has them
            self._figure.savefig(drawn, format="svg", metadata=nothing)
        return Drawn(self._title, Markup(_for_page(drawn.getvalue(), self._prefix, self._title, self._text)))


class Key(NamedTuple):
    """One entry of a legend."""

    name: str
    """What it stands for."""
    colour: str
    """Variable of its colour."""
    dash: str
    """Kind of its line: solid, dash, dot; or nothing."""
    symbol: str = ""
    """Its points, as a letter."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that belong together, with one legend and one caption."""

    title: str
    """Heading."""
    caption: str
    """What it shows, and how it was computed."""
    panels: tuple[Drawn, ...]
    """The panels, drawn."""
    legend: tuple[Key, ...] = ()
    """Entries of the legend."""


class Canvas:
    """What the figures of one page have in common: whose they are, colours, ids."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.group = groups[0]
        names = list(dict.fromkeys(name for group in groups for name in group.names if "," not in name))
        self.marks = Marks(names, self.group.target)
        self._prefixes = (f"f{i}" for i in itertools.count(1))

    def panel(
        self, title: str, text: str, *, height: float = HEIGHT, labels: Sequence[str] = (), bottom: float = 38
    ) -> Panel:
        """A `Panel` with ids of its own."""
        return Panel(next(self._prefixes), title, text, height=height, labels=labels, bottom=bottom)

    def legend(self, names: Sequence[str], *, of: Literal["lines", "points", "both"] = "lines") -> tuple[Key, ...]:
        """Entries of a legend."""
        marks = self.marks
        return tuple(
            Key(
                self.group.label_of(name),
                marks.variable(name),
                "" if of == "points" else marks.dash_in_words(name),
                "" if of == "lines" else GLYPHS[marks.symbol(name)],
            )
            for name in names
        )


def plain(text: str, longest: int = 400) -> str:
    """Text as XML can hold it: what does not print becomes a space, and what is too long is cut."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _for_page(svg: str, prefix: str, title: str, text: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    for name, colour in MARK.items():
        svg = svg.replace(colour, f"var(--{name})")
    # matplotlib's typeface gives way to the page's; its size and weight stay
    svg = re.sub(r"font: ((?:bold |\d+ )?)([\d.]+)px [^;\"]*", _font, svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    opening, rest = svg.split(">", 1)
    viewed = re.search(r'viewBox="[^"]*"', opening)
    assert viewed is not None
    labelled = f'role="img" aria-labelledby="{prefix}-title {prefix}-desc"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {viewed[0]} {labelled}>'
        f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(text)}</desc>{rest}'
    )


def _font(found: re.Match[str]) -> str:
    weight = found[1].strip()
    return f"font-size: {found[2]}px" + (f"; font-weight: {'600' if weight == 'bold' else weight}" if weight else "")


class Marks:
    """Colour, dash and symbol of each network, the same in every figure of a page."""

    def __init__(self, names: Sequence[str], hero: str | None) -> None:
        fixed = {"kd": 1, "teacher ensemble": 5, "single teacher": 6} | ({} if hero is None else {hero: 0})
        free = (place for place in itertools.count() if place not in (0, 1, 5, 6))
        self._places = {name: fixed[name] if name in fixed else next(free) for name in names}

    def variable(self, name: str) -> str:
        """Name of the style's variable of its colour."""
        place = self._place(name)
        return f"c{place + 1 if place < 7 else 3 + place % 3}"

    def colour(self, name: str) -> str:
        """Mark of its colour."""
        return MARK[self.variable(name)]

    def dash(self, name: str) -> Any:
        """Dash of its lines."""
        return DASHES[self._place(name) % len(DASHES)]

    def dash_in_words(self, name: str) -> str:
        """Class of the legend's line."""
        dash = self.dash(name)
        return "solid" if dash == "solid" else "dot" if dash == (0, (1.5, 1.5)) else "dash"

    def symbol(self, name: str) -> str:
        """Symbol of its points."""
        return SYMBOLS[self._place(name) % len(SYMBOLS)]

    def _place(self, name: str) -> int:
        return self._places.get(name, 6)
