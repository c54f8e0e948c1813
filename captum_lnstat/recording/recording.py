"""What one forward pass left: attention sites, norm calls, and the calls of the tapped modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.devices import has_a_queue
from captum_lnstat.recording.following import Path
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import TokenStatistics, mean_square, token_statistics
from captum_lnstat.recording.tape import Tape

# So many units of rounding of eps, a variance next to it is known well.
MANY = 1e4


@dataclass(frozen=True)
class NormCall:
    """One LayerNorm (or RMSNorm) call: which module ran it, and what it read.

    Attributes:
        module: Dotted name of the innermost running module.
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        input: What was normalised, ``(batch, *tokens, channel)``.
        dims: How many trailing dimensions are normalised together.
        moments: Mean and ``1 / sqrt(variance + eps)`` of every token as the kernel returned them, if it did.
    """

    module: str
    kind: str
    input: Kept
    dims: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    moments: tuple[Tensor, Tensor] | None = None

    @property
    def centred(self) -> bool:
        """Whether it subtracts the mean, as a LayerNorm does."""
        return self.kind == "layer_norm"

    def turned(self) -> NormCall:
        """The same with the first two dimensions of what it read the other way round."""
        moments = self.moments and (self.moments[0].transpose(0, 1), self.moments[1].transpose(0, 1))
        return replace(self, input=self.input.turned(), moments=moments)

    @property
    def statistics(self) -> TokenStatistics:
        """Mean and biased variance of every token at the input of this norm, in float32."""
        x = self.input.read()
        if self.kind == "rms_norm":
            square = mean_square(x if self.dims == 1 else x.flatten(-self.dims))
            return TokenStatistics(torch.zeros_like(square), square)
        if self.moments is not None and not has_a_queue(x.device):
            mean, deviation = (moment.detach().flatten(-self.dims) for moment in self.moments)
            variance = deviation[..., 0].square().reciprocal() - self.eps
            # Below that what is left of the variance next to eps is rounding.
            if bool((variance > MANY * torch.finfo(variance.dtype).eps * self.eps).all()):
                return TokenStatistics(mean[..., 0], variance)
        return token_statistics(x, self.dims)


_NONE = (
    "no attention was seen inside {!r}; expected one softmax over the keys, or scaled_dot_product_attention. Either it "
    "attends without a softmax (linear, sigmoid or ReLU attention), and no map of it is known; or a kernel hides it "
    "(flash_attn, xFormers, a scripted module), and has to be switched to PyTorch's own"
)
_TOO_MANY = (
    "{} attention maps were seen inside {!r}; expected one. How a module puts several together (differential, gated "
    "positions, branches) is not known: it needs a topology of its own. Methods that need no map, such as "
    "Captum's IntegratedGradients, take the model as it is"
)

_Event = TypeVar("_Event", NormCall, AttentionSite)


@dataclass(frozen=True)
class ModuleCall:
    """The first tensor a module was given and the tensor it returned."""

    input: Kept
    output: Kept

    def turned(self) -> ModuleCall:
        """The same with the first two dimensions of both the other way round."""
        return ModuleCall(self.input.turned(), self.output.turned())


@dataclass(frozen=True)
class Recording:
    """What one forward pass left: attention sites and norm calls in order, and the calls of the tapped modules.

    Attributes:
        sites: Attention sites, first to last.
        norms: LayerNorm and RMSNorm calls, first to last.
        stream_end: The residual stream where the head begins, in the head's graph, or ``None`` if none was marked.
        joins: How many tokens each part had that was joined along the tokens, for each such call before the head.
        constants: Those of the parts that are parameters, and parameters that were repeated: class token, prompts.
        provenance: Where on the image what a tapped module was given comes from, up to the first attention, if known.
        scores: What ``forward_func`` returned, in the same graph, once it has.
        places: Where what blocks, and modules before them, returned is in the same graph, by name.
        inside: What was made inside modules, and read outside them, by its name in ``places``.
        rows: Which rows of the stream's end its rows come from, if known.
        tape: What was called from there on, if that was to be kept.
        values: For tapped modules, from which of the tokens that one was given the values of the first attention in it
            come, if that was followed.
    """

    sites: tuple[AttentionSite, ...]
    norms: tuple[NormCall, ...]
    calls: dict[str, tuple[ModuleCall, ...]]
    stream_end: Tensor | None
    joins: tuple[tuple[int, ...], ...] = ()
    provenance: Mapping[str, Path] = field(default_factory=dict)
    scores: Tensor | None = None
    places: Mapping[str, GradientEdge] = field(default_factory=dict)
    inside: Mapping[str, Tensor] = field(default_factory=dict)
    constants: tuple[Tensor, ...] = ()
    rows: Path | None = None
    tape: Tape | None = None
    values: Mapping[str, Path] = field(default_factory=dict)

    def batch_first(self, modules: Iterable[str]) -> Recording:
        """The same where norms inside some modules, and the modules, had tokens before the batch: the batch first."""
        names = tuple(modules)
        inside = {id(norm) for name in names for norm in self.norms_inside(name) if norm.input.tensor.dim() == 3}
        norms = tuple(norm.turned() if id(norm) in inside else norm for norm in self.norms)
        turned = {name: tuple(call.turned() for call in self.calls.get(name, ())) for name in names}
        return replace(self, norms=norms, calls=self.calls | turned)

    def call(self, module: str) -> ModuleCall:
        """The one call of a tapped module."""
        calls = self.calls.get(module, ())
        if len(calls) != 1:
            why = "Weights that several places share" if calls else "Layers that are skipped, or run by another method,"
            raise RecordingError(
                f"module {module!r} ran {len(calls)} times in the forward pass; expected once. {why} are not known "
                "of this family"
            )
        return calls[0]

    def up_to_the_last(self, modules: Sequence[str]) -> Sequence[str]:
        """Modules up to the last of them that ran: a model that gives early features stops after it."""
        ran = [place for place, module in enumerate(modules) if module in self.calls]
        return modules[: ran[-1] + 1] if ran else modules

    def site(self, module: str) -> AttentionSite:
        """The one attention site inside a module."""
        found = self._sites_inside.get(module, [])
        if len(found) != 1:
            raise RecordingError(_TOO_MANY.format(len(found), module) if found else _NONE.format(module))
        return found[0]

    def sites_inside(self, module: str) -> list[AttentionSite]:
        """Every attention site inside a module, in order."""
        return self._sites_inside.get(module, [])

    def norm(self, module: str) -> NormCall:
        """The one norm call of a module."""
        found = self.norms_inside(module)
        if len(found) != 1:
            seen = ", ".join(norm.kind for norm in found) or "none"
            raise RecordingError(
                f"expected one call of a LayerNorm or RMSNorm at {module!r}, saw: {seen}. What is read there are the "
                "statistics of torch's own layer_norm, or of what returns the same as rms_norm"
            )
        return found[0]

    def norms_inside(self, module: str) -> list[NormCall]:
        """Every norm call inside a module, in order."""
        return self._norms_inside.get(module, [])

    def in_order(self, norms: Iterable[NormCall]) -> list[NormCall]:
        """Some of the norm calls, first to last."""
        return sorted(norms, key=lambda norm: self._place_of_norm[id(norm)])

    # Asked for every block: looked through once.
    @cached_property
    def _sites_inside(self) -> dict[str, list[AttentionSite]]:
        return _by_module(self.sites)

    @cached_property
    def _norms_inside(self) -> dict[str, list[NormCall]]:
        return _by_module(self.norms)

    @cached_property
    def _place_of_norm(self) -> dict[int, int]:
        return {id(norm): place for place, norm in enumerate(self.norms)}


def _by_module(events: Sequence[_Event]) -> dict[str, list[_Event]]:
    """Events by the name of every module that they happened in; by that of the model itself if in no other."""
    found: dict[str, list[_Event]] = {}
    for event in events:
        parts = event.module.split(".")
        for end in range(len(parts)):
            found.setdefault(".".join(parts[: end + 1]), []).append(event)
    return found
