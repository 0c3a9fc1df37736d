"""Plots as SVG text, by matplotlib: the extra `plots`."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"),
    *("#aa3377", "#bbbbbb", "#994455", "#997700", "#000000"),
)
"""Colours that people of any colour vision tell apart, in the order of their use (Paul Tol's bright scheme)."""
_STYLE: Final[Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "svg.fonttype": "none",
    "svg.hashsalt": "twotower",
    "text.parse_math": False,
}
"""Letters stay text in the font of the reader, names are no formulas, and the same figure has the same bytes."""
_SHORTER: Final = (
    (r'<g id="[^"]*">', "<g>"),  # names that every figure uses again
    (r" font-family: [^;\"]*;", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"(\.\d\d)\d+(?=[^<>]*>)", r"\1"),  # of places, not of letters
    (r"\n\s*", "\n"),
)
"""What is left out of an SVG element, which is half of it."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure of this many inches in the project's style; draw and write it inside."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: "Figure", title: str) -> str:
    """A figure as an SVG element that a page can hold beside others, said by its title to whoever cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    element = text.getvalue()[text.getvalue().index("<svg ") :]
    for pattern, shorter in _SHORTER:
        element = re.sub(pattern, shorter, element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" font-family="sans-serif" ', 1)
