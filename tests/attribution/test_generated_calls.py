"""Thousands of generated calls: a bad one ends in a documented error, a good one in a finite attribution.

A call is put together from parts (options, the function and its model, images, target, further arguments, keywords).
A bad call has one or two bad parts, each known to be bad by the way it was made, and has to raise; a good one has to
succeed. Neither leaves anything behind.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.common import _run_forward, _select_targets
from helpers.contract import distilled, registers, seeded, swin, swin_v2, untouched, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_lnstat import (
    AGCAM,
    AttCAT,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LeGrad,
    LNStatAttribution,
    RawAttention,
    RecordingError,
    UnsupportedModelError,
)
from captum_lnstat.rules import find_rule, rule_names

CLASSES, SIZE = 5, 16
_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 8, "depth": 1}
_SWIN = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_size": 2,
    "drop_path_rate": 0.0,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: vit(**_VIT, proj_drop_rate=0.1),
    "deit": lambda: distilled(**_VIT, proj_drop_rate=0.1),
    "dinov2": lambda: registers(**_VIT, proj_drop_rate=0.1),
    "swin": lambda: swin(**_SWIN, proj_drop_rate=0.1),
    "swinv2": lambda: swin_v2(**_SWIN, proj_drop_rate=0.1),
}
KINDS = (
    *(LNStatAttribution, LayerLNStat, RawAttention, AttentionRollout, GenericAttention, FrozenLayerNorm),
    *(LeGrad, AGCAM, AttCAT, BeyondIntuition),
)
# How many bad calls each class is given with this part of them bad, and what of the documented has to come up.
BAD_CALLS: dict[str, tuple[int, set[type[Exception]]]] = {
    "options": (70, {TypeError}),
    "function": (50, {TypeError, RecordingError}),
    "family": (6, {UnsupportedModelError}),
    "inputs": (40, {ValueError, TypeError}),
    "layout": (6, {TypeError}),
    "target": (40, {AssertionError, IndexError}),
    "further": (20, {TypeError}),
    "keywords": (10, {TypeError}),
    "state": (10, {RecordingError}),
    "layer": (40, {ValueError}),
}
STATES = ("eval", "train", "float64", "bfloat16", "float16")
GOOD_CALLS = 12
SHARES = ["deviation", "update", "half"]
OPTIONS: dict[str, list[Any]] = {
    "rule": ["lnstat", "evidence", "rollout", "gradient"],
    "residual": SHARES,
    "head_fusion": ["mean", "max", "min", lambda attention: attention.mean(1)],
    "merging": ["uniform", "variance"],
    "contrastive": [True, False],
    "normalized": [True],
    "interpolation": ["bilinear", "nearest"],
    "block": [0, -1],
    "approximation": ["token", "head"],
    "steps": [1, 2],
    "output": [None, lambda scores: scores],
}
NAMES = {
    LNStatAttribution: [name for name in OPTIONS if name not in ("block", "approximation", "steps")],
    LayerLNStat: [
        name for name in OPTIONS if name not in ("block", "normalized", "interpolation", "approximation", "steps")
    ],
    RawAttention: ["block", "head_fusion", "interpolation", "output"],
    AttentionRollout: ["head_fusion", "interpolation", "output"],
    GenericAttention: ["interpolation", "output"],
    FrozenLayerNorm: ["output"],
    LeGrad: ["interpolation", "output"],
    AGCAM: ["interpolation", "output"],
    AttCAT: ["interpolation", "output"],
    BeyondIntuition: ["approximation", "steps", "interpolation", "output"],
}
# What a call itself may raise, and what it may raise for a target that does not fit.
OWN = (ValueError, TypeError, UnsupportedModelError, RecordingError)
OF_A_TARGET = (AssertionError, IndexError, RuntimeError)


def documented(function: Any) -> set[str]:
    """The exceptions named under Raises."""
    section = re.search(r"Raises:\n(.*?)(\n\n|\Z)", function.__doc__ or "", re.S)
    return set(re.findall(r"\b\w+Error\b", section.group(1))) if section else set()


@cache
def model_of(family: str, state: str) -> nn.Module:
    if state == "eval":
        return FAMILIES[family]()
    if state == "inference":
        with torch.inference_mode():
            return FAMILIES[family]()
    model = copy.deepcopy(model_of(family, "eval"))
    if state == "train":
        return model.train()
    if state == "nan":
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "mlp.fc1" in name)[0, 0] = torch.nan
        return model
    return model.to(getattr(torch, state))


@cache
def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def block_of(model: nn.Module) -> nn.Module:
    return model.layers[0].blocks[0] if hasattr(model, "layers") else model.blocks[0]


def brief(thing: Any) -> str:
    """A tensor by its shape, a module by its class: what a failing example is told by."""
    if isinstance(thing, Tensor):
        return f"Tensor({tuple(thing.shape)}, {thing.dtype}, {thing.layout}, {thing.device})"
    if isinstance(thing, tuple | list):
        return f"{type(thing).__name__}({', '.join(map(brief, thing))})"
    return type(thing).__name__ if isinstance(thing, nn.Module) else repr(thing)


@dataclass(repr=False)
class Call:
    """One call, part by part."""

    kind: type
    model: nn.Module
    state: str
    forward: Any
    given: Any
    layer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None
    target: Any = None
    further: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Call({', '.join(f'{name}={brief(value)}' for name, value in vars(self).items())})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def make(self) -> Any:
        if self.kind is LayerLNStat:
            return LayerLNStat(self.forward, self.layer, self.given, **self.options)
        return self.kind(self.forward, self.given, **self.options)

    @property
    def image(self) -> Any:
        return self.inputs[0] if isinstance(self.inputs, tuple) and self.inputs else self.inputs

    @property
    def agnostic(self) -> bool:
        return self.kind in (RawAttention, AttentionRollout) or self.options.get("rule") == "rollout"


# Good parts.


@st.composite
def good_options(draw: st.DrawFn, kind: type) -> dict[str, Any]:
    names = draw(st.sets(st.sampled_from(NAMES[kind]))) | ({"steps"} & set(NAMES[kind]))
    chosen = {name: draw(st.sampled_from(OPTIONS[name])) for name in sorted(names)}
    if kind is LayerLNStat and chosen.get("rule") == "gradient":
        chosen["rule"] = "evidence"
    for name in list(chosen):  # an option without effect is refused
        ruled = kind in (LNStatAttribution, LayerLNStat) and any(
            name in find_rule(rule).options for rule in rule_names()
        )
        if ruled and name not in find_rule(chosen.get("rule", "lnstat")).options:
            chosen.pop(name)
    if chosen.get("rule") == "gradient" and draw(st.booleans()):
        chosen["normalized"] = False
    return chosen


@st.composite
def good_images(draw: st.DrawFn) -> Any:
    batch, size = draw(st.integers(1, 3)), draw(st.sampled_from([0.1, 1.0, 3.0]))
    image = size * torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    image = image.to(draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])))
    how = draw(st.sampled_from(["plain", "channels_last", "expanded", "leaf", "parameter", "strided"]))
    if how == "channels_last":
        image = image.to(memory_format=torch.channels_last)
    elif how == "expanded":
        image = image[:1].expand(batch, -1, -1, -1)
    elif how == "leaf":
        image.requires_grad_().grad = torch.ones_like(image)
    elif how == "parameter":
        image = nn.Parameter(image)
    elif how == "strided":
        image = image.transpose(2, 3)
    return (image,) if draw(st.booleans()) else image


@st.composite
def good_targets(draw: st.DrawFn, batch: int) -> Any:
    one = st.integers(0, CLASSES - 1)
    several = draw(st.lists(one, min_size=batch, max_size=batch))
    forms = [
        several[0],
        -1 - several[0],
        (several[0],),
        several,
        [(target,) for target in several],
        torch.tensor(several),
        torch.tensor(several, dtype=torch.int32),
        torch.tensor(several[0]),
        torch.tensor(several[:1]),
        np.int64(several[0]),
        [np.int32(target) for target in several],
    ]
    return draw(st.sampled_from(forms))


@st.composite
def good_calls(draw: st.DrawFn, kind: type, state: str = "eval") -> Call:
    model = model_of(draw(st.sampled_from(sorted(FAMILIES))), state)
    call = Call(kind, model, state, model, None, block_of(model))
    call.options = draw(good_options(kind))
    call.inputs = draw(good_images())
    call.target = draw(good_targets(len(call.image)))
    if call.agnostic and draw(st.booleans()):
        call.target = None
    form = draw(st.sampled_from(["model", "function", "scaled"]))
    if form != "model":
        call.given = model
        call.forward = (lambda x: model(x)) if form == "function" else (lambda x, scale: model(x) * scale)
    if form == "scaled":
        scales = [2.0, (2.0,), torch.tensor(2.0), torch.full((len(call.image), 1), 2.0)]
        call.further = draw(st.sampled_from(scales))
    if kind is LNStatAttribution and call.options.get("rule") == "evidence":
        call.keywords["return_convergence_delta"] = draw(st.booleans())
    if kind is LayerLNStat:
        call.keywords["attribute_to_layer_input"] = draw(st.booleans())
    return call


# Bad parts. Each makes any call bad.

JUNK: list[Any] = [
    *(None, 3, -1, 1.5, float("nan"), 1j, "nonsense", "", "Mean", b"mean", [], ["mean"], {}, (), ("ratio",), set()),
    *(object(), np.array(["mean", "half"]), np.float32(1), torch.zeros(2), Ellipsis, 2**70),
]
junk = st.one_of(st.sampled_from(JUNK), st.text(max_size=5), st.integers(), st.floats(), st.lists(st.integers()))


@st.composite
def break_options(draw: st.DrawFn, call: Call) -> None:
    names = [*NAMES[call.kind], "unknown"]
    name = draw(st.sampled_from(names))
    if name == "block":
        value = draw(st.one_of(st.integers(2, 2**70), st.integers(-(2**70), -3), junk))
        if isinstance(value, int):
            value += 2 if value >= 0 else -2
    elif name == "output":
        value = draw(st.one_of(st.sampled_from(["logits", 0, -1, "shape", lambda y: None, lambda y: 3, True]), junk))
        value = 0 if value is None else value
        if isinstance(value, str) and hasattr(Tensor, value):
            value = 0
    elif name in ("contrastive", "normalized"):
        value = draw(junk)
    elif name == "steps":  # any positive number of passes is good, and takes as long
        value = draw(st.one_of(st.integers(max_value=0), st.sampled_from([None, True, 2.0, "2", [2], torch.ones(1)])))
    else:
        value = draw(junk)
        if isinstance(value, str) and value in OPTIONS.get(name, []):
            value = None
    call.options = {**call.options, name: value}


@st.composite
def break_function(draw: st.DrawFn, call: Call) -> None:
    model = call.model
    wrongs: list[tuple[Any, Any]] = [
        (lambda x, *_: model(x), None),
        (lambda x, *_: model(x), "vit"),
        (lambda x, *_: model(x), vit),
        (None, model),
        ("vit", model),
        (3, None),
        (lambda x, *_: x.mean((2, 3)), model),
        (lambda x, *_: model(x) + model(x), model),
        (lambda x, *_: (model(x), 1), model),
        (lambda x, *_: {"scores": model(x)}, model),
        (lambda x, *_: model(x).detach().numpy(), model),
        (lambda x, *_: None, model),
        (lambda x, *_: model(x) * torch.nan, model),
        (lambda x, *_: model(x) / 0, model),
        (lambda x, *_: model(x[:, :, :8]), model),
        (lambda x, *_: model(torch.cat([x, x])), model),
        (lambda x, *_: 1 / 0, model),
    ]
    call.forward, call.given = draw(st.sampled_from(wrongs))


@st.composite
def break_family(draw: st.DrawFn, call: Call) -> None:
    model, other = call.model, convolutions()
    two = nn.ModuleList([model, copy.copy(model)])
    wrongs = [(other, None), (other, other), (lambda x, *_: model(x), other), (two, None), (model, two)]
    call.forward, call.given = draw(st.sampled_from(wrongs))


@st.composite
def break_state(draw: st.DrawFn, call: Call) -> None:
    state = draw(st.sampled_from(["nan", "inference"]))
    call.model = model_of(draw(st.sampled_from(sorted(FAMILIES))), state)
    call.forward, call.given, call.layer, call.further = call.model, None, block_of(call.model), None
    call.state = state


@st.composite
def break_inputs(draw: st.DrawFn, call: Call) -> None:
    how = draw(st.sampled_from(["rank", "empty", "size", "channels", "dtype", "value", "type", "tuple"]))
    good = call.image.detach()
    size = st.integers(1, 40)
    bad: Any
    if how == "rank":
        rank = draw(st.sampled_from([0, 1, 2, 3, 5, 6]))
        bad = torch.zeros(draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
    elif how == "empty":
        shape = [2, 3, SIZE, SIZE]
        for place in draw(st.sets(st.integers(0, 3), min_size=1)):
            shape[place] = 0
        bad = torch.zeros(shape)
    elif how == "size":
        height, width = draw(st.tuples(size, size).filter(lambda pair: pair != (SIZE, SIZE)))
        bad = torch.randn(len(good), 3, height, width)
    elif how == "channels":
        bad = torch.randn(len(good), draw(st.integers(1, 9).filter(lambda c: c != 3)), SIZE, SIZE)
    elif how == "dtype":
        kinds = [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64, torch.complex128]
        bad = torch.ones(len(good), 3, SIZE, SIZE, dtype=draw(st.sampled_from(kinds)))
    elif how == "value":
        bad = good.clone(memory_format=torch.contiguous_format)
        place = draw(st.integers(0, good.numel() - 1))
        bad.view(-1)[place] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    elif how == "type":
        bad = draw(st.one_of(st.sampled_from([[good], good.float().numpy(), {"x": good}, nn.Identity()]), junk))
        bad = None if isinstance(bad, tuple) else bad
    else:
        bad = draw(st.sampled_from([(), (good, good), (good, None), (None,), ((good,),), ([good],), ("x",), (good, 1)]))
    call.inputs = (bad,) if how != "tuple" and draw(st.booleans()) else bad


@st.composite
def break_layout(draw: st.DrawFn, call: Call) -> None:
    good = call.image.detach().float()
    nested = torch.nested.nested_tensor([*good], layout=torch.jagged)
    call.inputs = draw(st.sampled_from([good.to_sparse(), good.to("meta"), nested]))


@st.composite
def break_target(draw: st.DrawFn, call: Call) -> None:
    image = call.image
    batch = len(image) if isinstance(image, Tensor) and image.dim() == 4 and image.layout is torch.strided else 1
    outside = st.one_of(st.integers(min_value=CLASSES), st.integers(max_value=-CLASSES - 1))
    inside = st.integers(0, CLASSES - 1)
    how = draw(st.sampled_from(["outside", "list", "long", "tensor", "dtype", "arity", "type", "elements", "none"]))
    if how == "none":
        # What is class-agnostic needs none; anything else has to be told.
        target = draw(st.sampled_from([True, "1", 1.0])) if call.agnostic else None
    elif how == "outside":
        one = draw(outside)
        target = draw(st.sampled_from([one, (one,), [one] * batch]))
    elif how == "list":
        target = draw(st.lists(inside, min_size=batch, max_size=batch))
        target[draw(st.integers(0, batch - 1))] = draw(st.integers(CLASSES, 2**62))
        target = draw(st.sampled_from([target, torch.tensor(target)])) if batch > 1 else target
    elif how == "long":
        target = draw(st.lists(inside, max_size=8).filter(lambda found: len(found) not in (1, batch)))
        target = draw(st.sampled_from([target, torch.tensor(target), [(one,) for one in target]]))
    elif how == "tensor":
        target = draw(
            st.sampled_from([torch.zeros(batch, 2), torch.zeros(batch, CLASSES), torch.zeros(1, 1, 2)])
        ).long()
    elif how == "dtype":
        kind = draw(st.sampled_from([torch.float32, torch.bool, torch.complex64, torch.float16]))
        target = torch.ones(batch, dtype=kind)
    elif how == "arity":
        target = draw(st.sampled_from([(1, 2), (9999,) * 20, [(1, 2)] * batch, (), [()] * batch]))
    elif how == "type":
        values = [
            1.0,
            "1",
            b"1",
            {},
            {1},
            range(1),
            object(),
            True,
            1j,
            np.float32(1),
            np.array([1]),
            nn.Identity(),
            slice(1),
        ]
        target = draw(st.sampled_from(values))
    else:
        values = [None, 1.0, "1", b"1", [1], {}, object(), slice(1)]
        target = [draw(st.sampled_from(values)) for _ in range(batch)]
    call.target = target


@st.composite
def break_further(draw: st.DrawFn, call: Call) -> None:
    model = call.model
    if draw(st.booleans()):
        call.forward, call.given = model, None
        call.further = tuple(draw(st.lists(junk, min_size=3, max_size=5)))
    else:
        call.forward, call.given = (lambda x, scale: model(x) * scale), model
        wrong = [None, (), "x", {}, (2.0, 2.0), torch.ones(7), torch.tensor(torch.nan), float("inf"), (None,), object()]
        call.further = draw(st.sampled_from(wrong))


@st.composite
def break_keywords(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from(["baselines", "feature_mask", "n_steps", "targets", "perturbations_per_eval", "delta"]))
    if name == "delta" and call.options.get("rule") != "evidence":
        name = "return_convergence_delta"
    call.keywords = {**call.keywords, name: draw(st.sampled_from([True, 1, 5]))}


@st.composite
def break_layer(draw: st.DrawFn, call: Call) -> None:
    block = block_of(call.model)
    call.layer = draw(st.one_of(st.sampled_from([block.attn, block.mlp, call.model, copy.copy(block)]), junk))


BREAK: dict[str, Callable[[Call], st.SearchStrategy[None]]] = {
    "state": break_state,
    "options": break_options,
    "function": break_function,
    "family": break_family,
    "layout": break_layout,
    "inputs": break_inputs,
    "target": break_target,
    "further": break_further,
    "keywords": break_keywords,
    "layer": break_layer,
}


@st.composite
def bad_calls(draw: st.DrawFn, kind: type, part: str) -> tuple[Call, list[str]]:
    call = draw(good_calls(kind))
    other = draw(st.sampled_from([None, *(name for name in BREAK if kind is LayerLNStat or name != "layer")]))
    broken = {part, other} - {None}
    # Together these could mend each other: they put another function in place, or what is bad hangs on the rule.
    if (
        broken <= {"layout", "inputs"}
        or broken <= {"state", "function", "family", "further"}
        or broken <= {"options", "target", "keywords"}
    ):
        broken = {part}
    for name in [name for name in BREAK if name in broken]:
        draw(BREAK[name](call))
    return call, sorted(broken)


def others_error(call: Call) -> type[BaseException] | None:
    """What the function raises by itself for these images and arguments, or Captum for this target of its output."""
    image = call.image
    # What is no image at all has to be refused before anybody else sees it.
    if not callable(call.forward) or not plain_tensors(image) or image.dim() != 4 or not image.numel():
        return None
    if not image.is_floating_point() or not torch.isfinite(image).all():
        return None
    try:
        with torch.no_grad():
            dtype = next(call.model.parameters()).dtype
            output = _run_forward(call.forward, (image.detach().to(dtype),), None, call.further)
            if isinstance(output, Tensor):
                score = _select_targets(output, call.target)
                assert score[0].numel() == 1
    except Exception as error:
        return type(error)
    return None


def plain_tensors(*things: Any) -> list[Tensor]:
    flat = [part for thing in things for part in (thing if isinstance(thing, tuple | list) else [thing])]
    tensors = [thing for thing in flat if isinstance(thing, Tensor)]
    return [t for t in tensors if t.layout is torch.strided and not t.is_nested and t.device.type == "cpu"]


def test_what_is_documented() -> None:
    everything = {error.__name__ for error in (*OWN, *OF_A_TARGET)}
    assert documented(LNStatAttribution.attribute) == everything
    for kind in KINDS:
        assert documented(kind) == {"ValueError", "TypeError"}, kind
        if kind is LayerLNStat:
            assert documented(kind.attribute) == everything
        elif kind is not LNStatAttribution:
            assert "``LNStatAttribution.attribute``, errors included" in kind.attribute.__doc__


CASES = [(kind, part) for kind in KINDS for part in BAD_CALLS if part != "layer" or kind is LayerLNStat]


def test_there_are_enough() -> None:
    assert sum(BAD_CALLS[part][0] for _, part in CASES) >= 2000


@pytest.mark.parametrize(("kind", "part"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_bad_calls(kind: type, part: str) -> None:
    count, expected = BAD_CALLS[part]
    seen: Counter[type[Exception]] = Counter()

    @seeded(kind.__name__, part)
    @settings(max_examples=count)
    @given(bad_calls(kind, part))
    def run(drawn: tuple[Call, list[str]]) -> None:
        call, broken = drawn
        raised: Exception | None = None
        made = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with untouched(call.model, *plain_tensors(call.inputs, call.target, call.further)):
                try:
                    method = call.make()
                    made = True
                    method.attribute(call.inputs, call.target, call.further, **call.keywords)
                except Exception as error:
                    raised = error
        assert raised is not None, f"not refused, although {broken} is bad"
        assert str(raised)
        if not made:
            assert type(raised) in (ValueError, TypeError)
        elif type(raised) not in OWN:
            assert type(raised) is others_error(call), f"{type(raised).__name__} is not documented: {raised}"
        seen[type(raised)] += 1

    run()
    assert sum(seen.values()) >= count
    assert expected <= set(seen)
    assert part != "options" or kind is FrozenLayerNorm or ValueError in seen


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_good_calls(kind: type, state: str) -> None:
    seen = 0

    @seeded(kind.__name__, state)
    @settings(max_examples=GOOD_CALLS)
    @given(good_calls(kind, state))
    def run(call: Call) -> None:
        nonlocal seen
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with untouched(call.model, *plain_tensors(call.inputs, call.target, call.further)), torch.random.fork_rng():
                found = call.make().attribute(call.inputs, call.target, call.further, **call.keywords)
        if call.keywords.get("return_convergence_delta"):
            found, delta = found
            assert delta.shape == (len(call.image),)
            assert torch.isfinite(delta).all()
        assert isinstance(found, tuple) is isinstance(call.inputs, tuple)
        attribution = found[0] if isinstance(found, tuple) else found
        assert type(attribution) is Tensor
        assert attribution.dtype == call.image.dtype
        assert attribution.is_contiguous()
        assert not attribution.requires_grad
        assert torch.isfinite(attribution).all()
        if kind is LayerLNStat:
            assert attribution.shape[0] == len(call.image)
            assert attribution.shape[-1] == 8
        else:
            assert attribution.shape == call.image.shape
        messages = [str(warning.message) for warning in caught if "zero everywhere" not in str(warning.message)]
        assert any("train mode" in message for message in messages) is (state == "train")
        assert all("train mode" in message or "every patch token is zero" in message for message in messages)
        seen += 1

    run()
    assert seen >= GOOD_CALLS
