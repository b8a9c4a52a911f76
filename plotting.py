"""What all pictures of this repository share: one look, and files written whole or not at all.

Charts are drawn with matplotlib's Agg and SVG canvases directly, without pyplot: no window system, no global list of
figures, so a training run that draws every epoch does not grow. The same data gives the same bytes.

    with plotting.drawing(folder / "roc", 7, 5) as figure:
        axes = figure.add_subplot(xlabel="false accept rate", ylabel="true accept rate")
        axes.plot(...)
"""

import contextlib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, features

import utils

# Okabe and Ito's palette, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")

_LOOK: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),  # type: ignore[attr-defined]  # missing in its stubs
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # names of people and files may hold dollar signs
    "svg.hashsalt": "figures",  # otherwise element names are random
}
DPI = 150


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number, for `plot`: 28 that can be told apart."""
    turn, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": DASHES[turn % len(DASHES)]}


@contextlib.contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; afterwards write it to `path`.png and `path`.svg.

    Nothing is written when drawing raises.
    """
    path = Path(path)
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            with utils.atomic_path(path.with_name(path.name + suffix)) as temporary:
                figure.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=metadata)


def title(axes: Axes, subject: str, statement: str) -> None:
    """Two lines above the axes, at their left: what is shown (shortened to fit) and, bold, what it says."""
    subject, statement = legible(subject, shaped=False), legible(statement, shaped=False)
    room = int(cast("Figure", axes.figure).get_figwidth() * 12)  # characters of 11 points in so many inches
    subject = subject if len(subject) <= room else subject[: room - 1] + "…"
    axes.set_title(f"{subject}\n", loc="left")
    axes.annotate(statement, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", weight="bold")


def rate_floor(lowest: float) -> float:
    """Where an axis of rates that ends at 1 may begin so that `lowest` is well above its lower end."""
    wanted = lowest - (1 - lowest) / 4
    return max((step for step in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995) if step <= wanted), default=0.0)


def log_rate_axis(axes: Axes, lowest: float, *, axis: str = "x") -> None:
    """Make an axis a logarithmic scale of rates from `lowest` to 1, ticks written as 0.001, 0.01, ... 1."""
    scale = axes.set_xscale if axis == "x" else axes.set_yscale
    limits = axes.set_xlim if axis == "x" else axes.set_ylim
    scale("log")
    limits(lowest, 1.0)
    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_formatter(ticker.NullFormatter())


# --- sheets of pictures ---------------------------------------------------------------------------------------------


def legible(text: str, *, shaped: bool = True) -> str:
    """`text` in one line, with each character that our font cannot show written as \\uXXXX.

    Nobody reads a row of boxes, and half of a name may be another's name. Scripts that are written from right to left
    need a library that shapes them: Pillow has one in its wheels, matplotlib (`shaped` false) has none.
    """
    known = _characters()
    shaped = bool(shaped and features.check("raqm"))
    return "".join(
        character
        if ord(character) in known and (shaped or unicodedata.bidirectional(character) not in ("R", "AL", "AN"))
        else character.encode("unicode_escape").decode()
        for character in " ".join(text.split())
    )


@lru_cache
def _characters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans"))
    return frozenset(font_manager.get_font(path).get_charmap())


@lru_cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, in pixels."""
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)


def draw_text(
    canvas: Image.Image,
    xy: tuple[int, int],
    text: str,
    *,
    size: int = 13,
    width: int | None = None,
    colour: str = "black",
    bold: bool = False,
    keep_end: bool = False,
) -> None:
    """Write one line with its upper left corner at `xy`.

    What does not fit into `width` pixels ends in an ellipsis or, with `keep_end`, begins with one. See `legible` for
    characters that the font lacks.
    """
    face = font(size, bold=bold)
    text = legible(text)
    if width is not None and face.getlength(text) > width:
        while text and face.getlength(text + "…") > width:
            text = text[1:] if keep_end else text[:-1]
        text = "…" + text if keep_end else text + "…"
    ImageDraw.Draw(canvas).text(xy, text, font=face, fill=colour)


def fit(rgb: np.ndarray, side: int, boxes_xyxy: Sequence[np.ndarray] = ()) -> Image.Image:
    """A photo, uint8 RGB [H, W, 3], shrunk or enlarged into a grey square of `side` pixels, with boxes drawn in."""
    height, width = rgb.shape[:2]
    ratio = side / max(height, width)
    size = max(round(width * ratio), 1), max(round(height * ratio), 1)
    photo = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS)
    for box in boxes_xyxy:
        ImageDraw.Draw(photo).rectangle([float(value) * ratio for value in box], outline=ORANGE, width=2)
    square = Image.new("RGB", (side, side), "#eeeeee")
    square.paste(photo, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all."""
    with utils.atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
