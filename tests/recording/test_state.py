"""Nothing is left behind: after success, after a bad target, after an error raised anywhere on the way.

Models, methods, callers and failure points are drawn at random. What can fail is any module of the model before or
after it ran, the k-th attention or norm of the pass, the backward pass through any module, and every function that a
user hands in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.contract import EVERY_METHOD, WITH_A_GRAPH, distilled, images, seeded, swin, swin_v2, untouched, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_lnstat import LNStatAttribution

SIZE = 16
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {
        "build": [vit],
        "depth": [2, 3],
        "global_pool": ["token", "avg"],
        "qkv_bias": [True, False],
        "init_values": [None, 0.5],
        "fc_norm": [None, True],
        "reg_tokens": [0, 4],
    },
    "deit": {
        "build": [distilled],
        "depth": [2, 3],
        "qkv_bias": [True, False],
        "init_values": [None, 0.5],
    },
    "swin": {
        "build": [swin, swin_v2],
        "depths": [(1, 1), (2, 1), (1, 2)],
        "window_size": [2, 4],
        "qkv_bias": [True, False],
    },
}
_VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "swin": {"img_size": SIZE, "patch_size": 2, "embed_dim": 8, "num_heads": (1, 2)},
}


class UserError(Exception):
    """An error of the user's own."""


ERRORS = (UserError, RuntimeError, AssertionError, StopIteration, KeyboardInterrupt)
ATTENTION = (F.scaled_dot_product_attention, torch.softmax, F.softmax, Tensor.softmax)
NORMS = (F.layer_norm, torch.layer_norm, torch.native_layer_norm)


@cache
def built(family: str, options: tuple[tuple[str, Any], ...], fused: bool) -> nn.Module:
    chosen = dict(options)
    model = chosen.pop("build")(**{**SHAPES[family], **chosen})
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    for parameter in model.parameters():  # something that could be added to or taken away
        parameter.grad = torch.ones_like(parameter)
    return model


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    options = tuple((name, draw(st.sampled_from(values))) for name, values in FAMILIES[family].items())
    return built(family, options, draw(st.booleans()))


class FailAt(TorchFunctionMode):
    """Raises in the k-th call of some functions, on the outside of whatever the package records with."""

    def __init__(self, functions: tuple[Any, ...], number: int, error: BaseException) -> None:
        super().__init__()
        self.functions, self.left, self.error = functions, number, error

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.functions:
            self.left -= 1
            if self.left < 0:
                raise self.error
        return function(*args, **(kwargs or {}))


def fail(error: BaseException, *_: Any, **__: Any) -> Any:
    raise error


@cache
def ran(model: nn.Module) -> frozenset[str]:
    """The modules that a forward pass runs."""
    names: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(images(1, SIZE))
    for hook in hooks:
        hook.remove()
    return frozenset(names)


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def fail_backward(error: BaseException, module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(partial(fail, error))


CALLERS: dict[str, Callable[[], Any]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
# Where it fails, and how many random cases of that each of the methods is put through.
POINTS = {"module": 8, "attention": 4, "norm": 4, "backward": 6, "forward_func": 2, "target": 3, "nothing": 3}


@st.composite
def failures(draw: st.DrawFn, model: nn.Module, point: str) -> dict[str, Any]:
    failure: dict[str, Any] = {"point": point, "error": draw(st.sampled_from(ERRORS))("on purpose")}
    if point in ("module", "backward"):
        failure["module"] = draw(st.sampled_from(sorted(ran(model))))
        failure["when"] = draw(st.sampled_from(["before", "after"]))
    elif point in ("attention", "norm"):
        failure["number"] = draw(st.integers(0, 1 if point == "attention" else 4))
    elif point == "forward_func":
        failure["when"] = draw(st.sampled_from(["before", "after"]))
    elif point == "target":
        failure["target"] = draw(
            st.sampled_from([5, -6, [1], [1, 99], (1, 2), "1", 1.0, torch.tensor([1, 2, 3]), 2**70])
        )
    return failure


def broken_function(model: nn.Module, failure: dict[str, Any]) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        if failure["when"] == "after":
            model(x)
        raise failure["error"]

    return forward


def break_it(model: nn.Module, failure: dict[str, Any], stack: ExitStack) -> None:
    """Put the failure in place, until the stack closes."""
    point, error = failure["point"], failure["error"]
    if point in ("module", "backward"):
        module = model.get_submodule(failure["module"])
        if point == "backward":
            stack.enter_context(hooked(module.register_forward_hook(partial(fail_backward, error))))
        elif failure["when"] == "before":
            stack.enter_context(hooked(module.register_forward_pre_hook(partial(fail, error))))
        else:
            stack.enter_context(hooked(module.register_forward_hook(partial(fail, error))))
    elif point in ("attention", "norm"):
        functions = ATTENTION if point == "attention" else NORMS
        stack.enter_context(FailAt(functions, failure["number"], error))


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_nothing_is_left_behind(name: str, point: str) -> None:
    seen: Counter[bool] = Counter()

    @seeded(name, point)
    @settings(max_examples=POINTS[point])
    @given(st.data())
    def run(data: st.DataObject) -> None:
        model = data.draw(models())
        failure = data.draw(failures(model, point))
        caller = data.draw(st.sampled_from(sorted(CALLERS)))
        image = images(2, SIZE, seed=data.draw(st.integers(0, 3))).requires_grad_(data.draw(st.booleans()))
        if image.requires_grad:
            image.grad = torch.ones_like(image)
        given_as = (image,) if data.draw(st.booleans()) else image
        method = EVERY_METHOD[name](lambda x: model(x), model)
        function = method.forward_func
        with untouched(model, image):
            expected = method.attribute(image, target=1)
        if point == "forward_func":
            method.forward_func = broken_function(model, failure)
        raised: BaseException | None = None
        with ExitStack() as stack:
            break_it(model, failure, stack)
            with CALLERS[caller](), untouched(model, image):
                try:
                    found = method.attribute(given_as, target=failure.get("target", 1))
                except BaseException as error:
                    raised = error
        if point == "nothing":
            assert raised is None
        elif point == "target":
            assert isinstance(raised, (AssertionError, IndexError, RuntimeError, ValueError))
        elif point == "backward":
            # Which part of the model has a backward pass is the method's own business.
            assert raised in (None, failure["error"])
        else:
            assert raised is failure["error"]
        if raised is None:
            assert isinstance(found, tuple) is isinstance(given_as, tuple)
            if caller != "autocast":
                assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
        # And the object is as good as new.
        method.forward_func = function
        assert torch.equal(method.attribute(image, target=1), expected)
        seen[raised is not None] += 1

    run()
    assert sum(seen.values()) >= POINTS[point] // 2
    if point == "nothing":
        assert not seen[True]
    elif point != "backward":
        assert not seen[False]
    elif name in WITH_A_GRAPH:
        assert seen[True] >= POINTS[point] // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_in_turn(family: str) -> None:
    """The property above for one model, without chance."""
    model = built(family, tuple((name, values[-1]) for name, values in FAMILIES[family].items()), True)
    error, image = UserError(), images(1, SIZE)
    for name, when in (("lnstat", "before"), ("gradient", "after")):
        method, backwards = EVERY_METHOD[name](model), 0
        for module in sorted(ran(model)):
            with ExitStack() as stack:
                break_it(model, {"point": "module", "module": module, "when": when, "error": error}, stack)
                with untouched(model, image), pytest.raises(UserError) as raised:
                    method.attribute(image, target=1)
            assert raised.value is error
            with ExitStack() as stack:
                break_it(model, {"point": "backward", "module": module, "error": error}, stack)
                with untouched(model, image), suppress(UserError):
                    method.attribute(image, target=1)
                    backwards -= 1
            backwards += 1
        # Only the head has a backward pass, but for the rules with gradients.
        share = backwards / len(ran(model))
        assert share > 0.5 if name == "gradient" else 0 < share < 0.2


@pytest.mark.parametrize("option", ["head_fusion", "output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_functions_that_the_user_hands_in(family: str, option: str) -> None:
    model = built(family, tuple((name, values[0]) for name, values in FAMILIES[family].items()), True)
    error, image = UserError(), images(2, SIZE)
    for rule in ("lnstat", "evidence", "rollout"):
        method = LNStatAttribution(model, rule=rule, **{option: partial(fail, error)})  # type: ignore[arg-type]
        with untouched(model, image), pytest.raises(UserError) as raised:
            method.attribute(image, target=1)
        assert raised.value is error
