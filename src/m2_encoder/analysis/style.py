"""How pictures in notebooks look: the shipped font, which draws Chinese and English, and quiet axes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from m2_encoder.errors import UserError

INK: Final = "#1f2933"
MUTED: Final = "#7b8794"
LANGUAGE_COLORS: Final[Mapping[str, str]] = MappingProxyType({"zh": "#c05621", "en": "#0b5394"})
"""One colour for each language in all pictures."""

_GRID: Final = "#e4e7eb"
_CYCLE: Final = ("#0b5394", "#c05621", "#4aa3df", "#6b8e23", "#8e5ea2", "#b9a44c", "#7b8794")


def use_font() -> str:
    """Makes matplotlib draw with the shipped font, which has Chinese and English; gives its family.

    What it lacks is drawn in DejaVu Sans, but for exponents: a logarithmic axis takes
    `axes.xaxis.set_major_formatter("{x:g}")`. A single text may name the family: `axes.set_title("猫", family=...)`.

    Raises:
        UserError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'm2-encoder[plot]'") from error
    from m2_encoder.data.inspect.figure import load_fonts

    families, _ = load_fonts()
    matplotlib.rcParams["font.family"] = families
    matplotlib.rcParams["axes.unicode_minus"] = False  # the font has no minus of its own
    return families[0]


def use_style() -> None:
    """`use_font`, and for all later pictures quiet axes, titles at the left and a size that fits a notebook.

    Raises:
        UserError: without matplotlib.
    """
    use_font()
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.rcsetup import cycler

    pyplot.switch_backend(matplotlib.get_backend())  # a notebook then shows figures that pyplot has not made, too
    matplotlib.rcParams.update(
        {
            "figure.figsize": (9.0, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "text.color": INK,
            "axes.prop_cycle": cycler(color=_CYCLE),
            "axes.edgecolor": MUTED,
            "axes.labelcolor": MUTED,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titlecolor": INK,
            "axes.titlepad": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": _GRID,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
        }
    )
