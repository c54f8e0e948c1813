"""Two classes of one image beside each other, and what argued for the one rather than the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.recording.forward import Output
from captum_lnstat.visualize.canvas import Bar, Row, draw_rows, notes
from captum_lnstat.visualize.colors import PLAIN, Look, Scale, overlay
from captum_lnstat.visualize.maps import to_map

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.visualize.maps import Picture


def class_sheet(
    model: nn.Module,
    inputs: Float[Tensor, "1 channel height width"],
    image: Picture,
    targets: tuple[int, int],
    names: tuple[str, str],
    title: str,
    *,
    output: Output = None,
    look: Look = PLAIN,
) -> Figure:
    """The contrast of two classes.

    The first row is the rule ``lnstat`` for each class, the second ``evidence``, both classes on one scale. The last
    column is the first class minus the second; for evidence, which is complete, it adds up to the difference of the
    two scores.

    Args:
        model: The transformer, in eval mode.
        inputs: One image, normalised for it.
        image: The same, ``(height, width, 3)``, to lay the maps on.
        targets: Two different classes.
        names: What they are called.
        title: Shown above.
        output: As for ``LNStatAttribution``.
        look: How maps are laid over the image.

    Raises:
        ValueError: The two classes are one.
        UnsupportedModelError, RecordingError: As for ``LNStatAttribution.attribute``.
    """
    if targets[0] == targets[1]:
        raise ValueError(f"both classes are {targets[0]}; expected two different ones")
    rows: list[Row] = []
    for rule, label in (("lnstat", "LNStat"), ("evidence", "evidence")):
        method = LNStatAttribution(model, rule=rule, output=output)
        one, other = (to_map(method.attribute(inputs, target)[0]) for target in targets)
        scale = Scale.of([one, other], signed=rule == "evidence")
        apart, differ = one - other, Scale(0.0, scale.high - scale.low, signed=True)
        cells = (
            image if not rows else None,
            overlay(image, one, scale=scale, look=look),
            overlay(image, other, scale=scale, look=look),
            overlay(image, apart, scale=differ, look=look),
        )
        bars = (None, *(Bar.of(each, look=look) for each in (scale, scale, differ)))
        rows.append(Row(label, cells, None, "score per pixel; both classes on one scale", bars=bars))
    heads = ["image", names[0], names[1], f"{names[0]}\nminus {names[1]}"]
    note = "last column: red for the first class, blue for the second"
    if look.colormap is not None:
        note = "last column: upper end of the colours for the first class, lower end for the second"
    return draw_rows(rows, title, titles=heads, note=notes([], look, note))
