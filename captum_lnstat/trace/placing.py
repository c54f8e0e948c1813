"""Whether the tokens of the first block are the patches in the order of the image's rows, and where they lie if not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.following import Path
from captum_lnstat.recording.provenance import NOWHERE, SEVERAL, Lattice, Provenance, alone, one_a_row
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.remembered import number_of, remembered
from captum_lnstat.trace.trace import Trace

MOVED = "The model puts its tokens in another order before the first block; on the map they are where they came from."
# So far from the middle of its cell, in cells, a token of overlapping convolutions may be.
BESIDE = 0.25


def placed(trace: Trace, recording: Recording) -> Trace:
    """The trace with its tokens where they were seen to come from. One of which nothing is known is returned as it is.

    Raises:
        RecordingError: The rows of the batch are not the images, in their order.
        UnsupportedModelError: The tokens are not the patches of the images, each once.
    """
    name = trace.steps[0].name
    path = _path_before(recording, name)
    if path is None:
        return trace
    number = None
    if path.number is not None and trace.place is None:
        tokens = trace.grid, trace.prefix, trace.suffix, trace.tokens.shape[:2], trace.tokens_first
        number = number_of("placed", path.number, name, tokens, trace.patch, trace.origin)
    # The same for all that is found of the trace.
    found = remembered(number, lambda: _found(replace(trace, covers=""), path.provenance, name))
    place = None if found.place is None else found.place.to(trace.tokens.device)
    covers = " ".join(filter(None, (trace.covers, found.covers)))
    return replace(trace, place=place, patch=found.patch, origin=found.origin, covers=covers)


def _found(trace: Trace, places: Provenance | None, name: str) -> Found:
    tokens = None if places is None else _tokens(places, trace)
    if places is None or tokens is None:
        return Found.of(trace)
    count = math.prod(trace.grid)
    on_cpu = replace(trace, place=None if trace.place is None else trace.place.cpu())
    seen, lattice = on_cpu.on_grid(tokens).flatten(1), places.lattice
    if bool((seen == SEVERAL).any()):
        raise UnsupportedModelError(
            f"before {name!r} {places.mixed or 'a function'} makes tokens that come from several places of the image "
            "each, so relevance of a token cannot be placed on it; expected every token to be one patch"
        )
    if bool((seen == NOWHERE).any()) or lattice.cells != count:
        raise UnsupportedModelError(
            f"the first block, {name!r}, was given {int((seen[0] >= 0).sum())} tokens of patches where "
            f"{count} were looked for, out of {lattice.cells}; expected all patches, and every other token before them"
        )
    images, _ = lattice.where(seen)
    rows = torch.arange(len(seen), device="cpu")[:, None]
    if not torch.equal(images, rows.expand_as(images)):
        image = int(images[(images != rows).any(1)][0, 0])
        row = int((images != rows).any(1).nonzero()[0, 0])
        raise RecordingError(
            f"row {row} of the batch that the first block was given is image {image}: forward_func or the model puts "
            "the images in another order; expected them in the order in which they were given. Explain them one by one"
        )
    return Found.of(_moved(trace, seen % count, lattice, name))


@dataclass(frozen=True)
class Found:
    """What was found of a trace: its fields of these names."""

    place: Tensor | None
    patch: tuple[int, ...]
    origin: tuple[float, ...]
    covers: str

    @classmethod
    def of(cls, trace: Trace) -> Found:
        """Those of a trace."""
        return cls(trace.place, trace.patch, trace.origin, trace.covers)


def _path_before(recording: Recording, name: str) -> Path | None:
    """The way of what a block was given, if it was followed."""
    inside = [module for module in recording.provenance if f"{name}.".startswith(f"{module}.")]
    return recording.provenance[max(inside, key=len)] if inside else None


def places_before(recording: Recording, name: str) -> Provenance | None:
    """Where what a block was given comes from; ``None`` where nothing is known of it."""
    path = _path_before(recording, name)
    return None if path is None else path.provenance


def check_rows(recording: Recording) -> None:
    """The rows of the scores have to be those of the stream, in their order."""
    path = recording.rows
    if path is not None:
        number = None if path.number is None else number_of("rows", path.number)
        remembered(number, lambda: _check_rows(path.provenance))


def _check_rows(places: Provenance | None) -> None:
    if places is None or not places.shape:
        return
    rows = one_a_row(places.read())
    wrong = ((rows != torch.arange(len(rows), device="cpu")) & (rows != NOWHERE)).nonzero()[:, 0].tolist()
    if wrong:
        seen = int(rows[wrong[0]])
        what = f"of row {seen} of the batch that the model was given" if seen >= 0 else "made of several rows"
        raise RecordingError(
            f"row {wrong[0]} of the scores is {what}: forward_func or the model puts the scores in another order than "
            "the images; expected one row of scores for each image, in the images' order. Explain them one by one"
        )


def _tokens(places: Provenance, trace: Trace) -> Tensor | None:
    """The places of the tokens before the first step, ``(batch, token)``, whether channels come first or last."""
    ids, count = places.read(), math.prod(trace.grid)
    ids = ids.transpose(0, 1) if trace.tokens_first else ids
    both = [alone(ids, dim).flatten(1) for dim in ((-1, 1) if ids.dim() > 3 else (-1,))]
    found = [one for one in both if len(one) == len(trace.tokens) and one.shape[1] in (count, trace.tokens.shape[1])]
    clear = (one for one in found if not bool((one == SEVERAL).any()))
    return next(clear, found[0] if found else None)


def _moved(trace: Trace, cells: Tensor, lattice: Lattice, name: str) -> Trace:
    """Every token where it came from."""
    count = math.prod(trace.grid)
    if lattice.shape[1:] != trace.grid:
        raise UnsupportedModelError(
            f"the tokens of {name!r} come from {' x '.join(map(str, lattice.shape[1:]))} patches, and a grid of "
            f"{' x '.join(map(str, trace.grid))} was recognised; expected the one to be the other"
        )
    flipped = [axis for axis, pitch in enumerate(lattice.pitch) if pitch < 0]
    cells = torch.arange(count, device="cpu").reshape(trace.grid).flip(flipped).flatten()[cells]
    place = cells.argsort(1)
    if not torch.equal(cells.gather(1, place), torch.arange(count, device="cpu").expand_as(cells)):
        raise UnsupportedModelError(
            f"the tokens of {name!r} hold some patches twice and others not at all; expected every patch once"
        )
    trace = _shifted(trace, lattice)
    if torch.equal(place, torch.arange(count, device="cpu").expand_as(place)):
        return trace
    own = trace.place
    if own is not None:
        place = own.to(place.device)[place] if own.dim() == 1 else own.to(place.device).gather(1, place)
    place = place[0] if bool((place == place[0]).all()) else place
    return replace(trace, place=place, covers=MOVED)


def _shifted(trace: Trace, lattice: Lattice) -> Trace:
    """Patches as large, and beginning where, what cut them has put them."""
    pitch: tuple[float, ...] = tuple(abs(step) for step in lattice.pitch)
    starts = zip(lattice.origin, lattice.pitch, lattice.shape[1:], strict=True)
    first = tuple(start + min(0.0, step * (cells - 1)) for start, step, cells in starts)
    begins = tuple(middle - (step - 1) / 2 for middle, step in zip(first, pitch, strict=True))
    beside = max(abs(begin) / step for begin, step in zip(begins, pitch, strict=True))
    if list(pitch) == list(trace.patch) and beside <= (BESIDE if lattice.reaches else 1e-6):
        return trace
    if any(step != int(step) for step in pitch):
        raise UnsupportedModelError(
            f"one token lies {' x '.join(f'{step:g}' for step in pitch)} px from the next; expected whole pixels. "
            "Resize the images before you explain them"
        )
    return replace(trace, patch=tuple(map(int, pitch)), origin=begins if any(begins) else ())
