"""Recorder: what happened in one forward pass, seen from a ``TorchFunctionMode``.

The mode sees every attention and every LayerNorm, fused kernels and functional calls included, on this thread only,
and leaves the model's results alone. Module hooks, removed afterwards, only stamp which module is running, keep the
inputs and outputs of the modules a topology asked for, and mark where the head begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from threading import get_ident
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_lnstat.recording.calling import first_given, first_returned, with_first
from captum_lnstat.recording.constant_weights import linear, with_constant_weights
from captum_lnstat.recording.eager import names_and_modules
from captum_lnstat.recording.ending import StreamEnd, over
from captum_lnstat.recording.following import Following
from captum_lnstat.recording.freezing import LAYER_NORMS, SOFTMAXES, Freezer
from captum_lnstat.recording.fused import run_fused
from captum_lnstat.recording.hooks import Hooks, stamps, unseen
from captum_lnstat.recording.joins import Joins
from captum_lnstat.recording.kept import Arena, Kept
from captum_lnstat.recording.multi_head import MultiHeadSite
from captum_lnstat.recording.norms import Norms
from captum_lnstat.recording.places import IMAGE, Places
from captum_lnstat.recording.recording import ModuleCall, Recording
from captum_lnstat.recording.rms import RMS_NORMS, rms_channels
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.softmaxes import Softmaxes, SoftmaxEvent
from captum_lnstat.recording.tape import Tape
from captum_lnstat.recording.watched import LEAVES, TO_NUMPY, WATCHED

# What of a model gets a graph: see ``Recorder``.
Differentiable = Literal["head", "model", "affine"]


class Recorder(TorchFunctionMode):
    """Context manager that records one forward pass of ``model`` on this thread.

    Args:
        model: The module whose submodules stamp the events.
        taps: Modules whose input and output are kept by reference.
        head_begins: The module whose input is the end of the residual stream, or, with ``head_follows`` in its place,
            the module whose output it is. The head from there on runs with a graph and with frozen LayerNorm
            statistics; its values are bit for bit those of the model.
        places: The modules that the residual stream leaves by: what each returns is marked in the head's graph, which
            is then made of all that lies between and beside them. For ``"head"`` only.
        channels_first: There the stream has its channels before its rows; it is kept with them last.
        width: How many channels it has, where they may be first or last.
        tokens_first: Whether a stream has its tokens before its batch; it is kept with the batch first.
        differentiable: What gets a graph. ``"head"``: the head alone, cut off from the trunk, with its LayerNorms
            frozen. ``"model"``: all of it as it is. ``"affine"``: all of it, with norms, attention probabilities and
            activation gates frozen: the model is then affine for autograd.
        compact: Copy large tensors to a place of their own, out of the model's way; for ``"head"`` only.
        detailed: Keep what the softmaxes read, and the calls of the head, too.
        images: What ``forward_func`` is given, if it is followed where on it the tokens come from.
        values: Follow the values of every attention, too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> with torch.no_grad(), Recorder(layer) as recorder:
        ...     _ = layer(torch.rand(1, 5, 8))
        >>> [site.module for site in recorder.recording.sites], [norm.module for norm in recorder.recording.norms]
        (['self_attn'], ['norm1', 'norm2'])
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[nn.Module] = (),
        head_begins: nn.Module | None = None,
        head_follows: nn.Module | None = None,
        places: Iterable[nn.Module] = (),
        *,
        channels_first: bool = False,
        width: int | None = None,
        tokens_first: Callable[[Tensor], bool] | None = None,
        differentiable: Differentiable = "head",
        compact: bool = False,
        detailed: bool = False,
        images: Tensor | None = None,
        values: bool = False,
    ) -> None:
        super().__init__()
        self._model = model
        self._taps, self._head_begins, self._head_follows = set(taps), head_begins, head_follows
        self._differentiable = differentiable
        # What is in a graph is kept by the graph, where it is.
        self._arena = Arena() if differentiable == "head" and compact else None
        self._freezer = Freezer() if differentiable == "affine" else None
        self.following = Following(images, values=values)
        self._places = Places(model, places if differentiable == "head" else (), self.following.same)
        self._thread = get_ident()
        self._grad_enabled = torch.is_grad_enabled()
        self._hooks = Hooks()
        self._running: list[str] = [""]
        self._events: list[AttentionSite | SoftmaxEvent] = []
        self._softmaxes = Softmaxes(self._arena, self.following.attends_to, detailed=detailed)
        self._norms = Norms(self._keep, self._call, self._arena, differentiable)
        self._joins = Joins(tokens_first)
        self._calls: dict[str, list[ModuleCall]] = {}
        name, cut = type(model).__name__, differentiable == "head"
        self._end = StreamEnd(name, channels_first, width, tokens_first, cut, self._keep, self.following)
        self.tape = Tape(self._end, keeps=detailed)

    @property
    def recording(self) -> Recording:
        """What has been recorded; read it after the context has closed."""
        sites = tuple(event.site if isinstance(event, SoftmaxEvent) else event for event in self._events)
        calls = {name: tuple(calls) for name, calls in self._calls.items()}
        joins, constants = tuple(self._joins.sizes), tuple(self._joins.constants)
        edges, given = dict(self._places.edges), self.following.given
        return Recording(
            sites, tuple(self._norms.calls), calls, self._end.tensor, joins, given, constants=constants,
            places=edges, inside=self._places.within.read, values=self.following.values,
        )  # fmt: skip

    def marked(self, image: Tensor) -> Tensor:
        """The images that the pass is to be run with, so that a score that reads them by another path is seen to."""
        return self._places.mark(IMAGE, image) if self._places else image

    def __enter__(self) -> Recorder:
        self._grad_enabled = torch.is_grad_enabled()
        try:
            looked_at = self._taps | {self._model, self._head_begins, self._head_follows}
            for name, module in names_and_modules(self._model):
                if type(module) in LEAVES and module not in looked_at:
                    continue
                passed_on = module in self._places or module is self._head_follows
                rms_norm = rms_channels(module) is not None
                if module in looked_at or passed_on or rms_norm:
                    first = unseen(self._passing_on(name)) if passed_on else None
                    before, after = unseen(self._entering(name)), unseen(self._leaving(name, rms_norm))
                    self._hooks.add(module, before, after, first, keywords=True)
                else:
                    self._hooks.add(module, *stamps(name, self._running))
        except BaseException:
            self._hooks.remove()
            raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.remove()
        self._softmaxes.clear()
        self._places.within.clear()
        # They hold methods of this recorder, and would keep it, and all that it kept, from being freed with the call.
        self._end.keep = self._norms.keep = over
        self._norms.call = over
        if self._freezer is not None:
            self._freezer.clear()
        torch.set_grad_enabled(self._grad_enabled)  # the head has switched gradients on
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _keep(self, tensor: Tensor) -> Kept:
        # Of the graph beside the trunk nothing is kept alive by what was recorded of the trunk.
        if tensor.requires_grad and self._places and self._end.tensor is None:
            tensor = tensor.detach()
        return Kept.on(self._arena, tensor)

    # Other threads may run the same model while this one records: their calls are none of our business.
    def _elsewhere(self) -> bool:
        return get_ident() != self._thread

    # Nor need another thread, between two of the dictionaries of hooks, call them with the arguments by keyword.
    def _entering(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, *called: Any) -> Any:
            if self._elsewhere():
                return None
            (keywords,) = called
            self._running.append(name)
            self._end.passes += module is self._model
            self._places.enter(module)
            given = first_given(module, inputs, keywords)
            if module in self._taps:
                self.following.entering(name, given)
            if module is self._head_begins:
                begun = self._end.begin_head(name, given)
                return None if begun is given else with_first(begun, inputs, keywords, given)
            return None

        return hook

    def _passing_on(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, *called: Any) -> Any:
            if self._elsewhere():
                return None
            _, output = called
            marked = self._places.leave(name, module, output)
            if module is self._head_follows and self._differentiable == "head":
                return self._head_after(name, output if marked is None else marked)
            return marked

        return hook

    def _leaving(self, name: str, rms_norm: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, *called: Any) -> Any:
            if self._elsewhere():
                return None
            keywords, output = called
            self._running.pop()
            given = first_given(module, inputs, keywords)
            self.following.leaving(name)
            # A block may return its attention maps beside its tokens.
            if rms_norm and isinstance(given, Tensor) and isinstance(output, Tensor):
                output = self._norms.own_rms_norm(name, module, given, output, frozen=self._freezes_norms)
            first = first_returned(output)
            if module in self._taps and isinstance(first, Tensor) and isinstance(given, Tensor):
                # What a module is given is compared by where it lies: in the head, too, where its copy lies.
                kept = self._keep(given.detach() if self._places else given)
                self._calls.setdefault(name, []).append(ModuleCall(kept, self._keep(first)))
            if module is not self._head_follows or first is self._end.passed_on or self._end.refused:
                return output if rms_norm else None
            if self._differentiable == "head":
                self._end.tensor = None  # a hook of somebody else's changed what the module returned
            return self._head_after(name, output)

        return hook

    def _head_after(self, name: str, output: Any) -> Any:
        """The head begins at what a module returned: what is passed on in its place."""
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            return None
        begun = self._end.begin_head(name, first)
        return None if begun is first else begun if first is output else (begun, *output[1:])

    @property
    def _freezes_norms(self) -> bool:
        cut = self._differentiable == "head" and (self._end.tensor is not None or self._places.any_left)
        return cut and (torch.is_grad_enabled() or self._beside_the_trunk)

    @property
    def _beside_the_trunk(self) -> bool:
        """What runs now may be read by a head, though the stream has not ended.

        Of that, function by function has a graph. For modules, and for whom they ask whether gradients are switched
        on (checkpointing, backward hooks), they stay switched off until the head begins.
        """
        return bool(self._places) and self._end.tensor is None and not self._places.inside

    @property
    def _ours(self) -> bool:
        """A backward pass of the model that only the gradient rule will run."""
        return self._differentiable == "model" and len(self._running) > 1

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if get_ident() != self._thread:
            return function(*args, **kwargs)
        inside, within = self._places.inside and self._end.tensor is None, self._places.within
        # In a block of a trunk without a graph few functions are looked at, once tokens are placed.
        if inside and self.following.is_over and function not in WATCHED and not self._softmaxes.reads_one(args):
            return within.made(self._running[-1], args, function(*args, **kwargs))
        args, kwargs = (args, kwargs) if inside else within.outside((args, kwargs), self._places.mark)
        if function in TO_NUMPY and self._differentiable == "head":
            function = torch.no_grad()(function)  # whether it may be run is for the caller's grad mode to say
        if self._beside_the_trunk and function is not torch._C._set_grad_enabled:
            with torch.enable_grad():
                output = self._run(function, args, kwargs)
        else:
            output = self._run(function, args, kwargs)
        if inside:
            within.made(self._running[-1], args, output)
        self.following.ran(function, args, kwargs, output, last=bool(self._events) and self._end.tensor is None)
        self.tape.ran(function, args, kwargs, output)
        return output

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Of the trunk of a head that was cut off, every function is called as it is, and only some are looked at.
        if self._differentiable == "head" and function not in WATCHED and not self._softmaxes.reads_one(args):
            return function(*args, **kwargs)
        frozen = self._freezes_norms
        if function in LAYER_NORMS:
            return self._norms.layer_norm(self._running[-1], function, *args, frozen=frozen, **kwargs)
        if function in RMS_NORMS:
            function = self._norms.rms_norm(self._running[-1], function, args, kwargs, frozen=frozen)
        if function is F.scaled_dot_product_attention:
            self.following.attends_to(kwargs["value"] if "value" in kwargs else args[2])
            call = partial(self._call, function, args, kwargs)
            output, fused = run_fused(call, self._running[-1], self._keep, self._ours, *args, **kwargs)
            self._events.append(fused)
            return output
        own = self._softmaxes.product(function, args) if self._ours else None
        output = self._call(function, args, kwargs) if own is None else own
        if self._end.tensor is None:
            self._joins.note(function, output, args, kwargs)
        if function is F.multi_head_attention_forward:
            self._events.append(MultiHeadSite.of(self._running[-1], output[0], self._keep, args, kwargs))
            self.following.attends_to(kwargs["value"] if "value" in kwargs else args[2])
        elif function in SOFTMAXES:
            event = self._softmaxes.begin(self._running[-1], output, *args, **kwargs)
            self._events += [] if event is None else [event]
        else:
            self._softmaxes.follow(function, output, args, kwargs)
        return output

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What forward_func does around the model (a softmax of the scores) is differentiated as it is.
        if len(self._running) == 1:
            return function(*args, **kwargs)
        if self._freezer is not None:
            return self._freezer(function, args, kwargs)
        if self._differentiable == "model":
            args, kwargs = with_constant_weights(function, args, kwargs)
            if function is F.linear:
                return linear(*args, **kwargs)
        return function(*args, **kwargs)
