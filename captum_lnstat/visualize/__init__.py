"""Pictures for people: relevance in colour, laid over the image, and sheets that set several maps beside each other.

Everything is drawn through matplotlib's objects, never through pyplot, so nothing here needs a display or touches the
figures and backends of the program that calls it.
"""

from captum_lnstat.attribution.methods import INTEGRATED_BATCH, INTEGRATED_STEPS, METHODS, Method
from captum_lnstat.visualize.canvas import Bar, Row, draw_rows
from captum_lnstat.visualize.classes import class_sheet
from captum_lnstat.visualize.colors import GREY, PLAIN, Look, Scale, colored, overlay, scaled
from captum_lnstat.visualize.compare import ComparedImage, compare_sheet, comparison
from captum_lnstat.visualize.frames import frame_sheet
from captum_lnstat.visualize.layers import head_sheet, layer_sheet
from captum_lnstat.visualize.maps import to_map, to_picture
from captum_lnstat.visualize.photograph import framed
from captum_lnstat.visualize.sheet import Panel, draw_sheet, draw_targets
from captum_lnstat.visualize.writing import write_figure, write_sheet

__all__ = [
    "GREY",
    "INTEGRATED_BATCH",
    "INTEGRATED_STEPS",
    "METHODS",
    "PLAIN",
    "Bar",
    "ComparedImage",
    "Look",
    "Method",
    "Panel",
    "Row",
    "Scale",
    "class_sheet",
    "colored",
    "compare_sheet",
    "comparison",
    "draw_rows",
    "draw_sheet",
    "draw_targets",
    "frame_sheet",
    "framed",
    "head_sheet",
    "layer_sheet",
    "overlay",
    "scaled",
    "to_map",
    "to_picture",
    "write_figure",
    "write_sheet",
]
