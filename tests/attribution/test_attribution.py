"""What attribute, relevance and describe give, whatever the state of the model, the caller and the other threads."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.choices import pairwise
from helpers.contract import (
    CLASS_AGNOSTIC,
    METHODS,
    MODELS,
    CountCalls,
    Normalise,
    images,
    passes,
    same_when_checkpointed,
    swin,
    untouched,
    vit,
)
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution

Make = Callable[..., Any]


def test_one_forward_call(model: nn.Module, make: Make) -> None:
    counted = CountCalls(model)
    method = make(counted)
    for call in (method.attribute, method.relevance, method.describe):
        counted.count = 0
        call(images(), target=1)
        assert counted.count == (1 if call == method.describe else passes(make))


def test_repeats_bit_for_bit(model: nn.Module, make: Make) -> None:
    method, image = make(model), images()
    first = method.attribute(image, target=1)
    method.attribute(images(seed=1), target=3)
    assert torch.equal(method.attribute(image, target=1), first)
    assert torch.equal(make(model).attribute(image, target=1), first)
    assert not torch.equal(method.attribute(images(seed=1), target=1), first)


def test_batch_equals_its_images(model: nn.Module, make: Make) -> None:
    method, image = make(model), images(5)
    together = method.attribute(image, target=1)
    for order in ([0], [3], [4, 1, 0, 3, 2]):
        torch.testing.assert_close(method.attribute(image[order], target=1), together[order], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("name", MODELS)
def test_pixels_sum_to_the_grid(name: str, interpolation: Any) -> None:
    model, image = MODELS[name](), images(3)
    for rule in ("lnstat", "evidence", "rollout", "gradient"):
        method = LNStatAttribution(model, rule=rule, interpolation=interpolation)
        attribution, grid = method.attribute(image, target=1), method.relevance(image, target=1)
        torch.testing.assert_close(attribution.sum((1, 2, 3)), grid.sum((1, 2)), rtol=1e-5, atol=1e-6)
        assert torch.equal(attribution[:, 0], attribution[:, 2])
        if interpolation == "nearest":
            rows, columns = grid.shape[1:]
            patches = attribution.unflatten(2, (rows, -1)).unflatten(4, (columns, -1)).sum((1, 3, 5))
            torch.testing.assert_close(patches, grid, rtol=1e-5, atol=1e-6)


def test_one_channel(make: Make) -> None:
    image = images(channels=1)
    for model in (vit(in_chans=1), swin(in_chans=1)):
        method = make(model)
        attribution = method.attribute(image, target=1)
        assert attribution.shape == image.shape
        torch.testing.assert_close(attribution.sum((1, 2, 3)), method.relevance(image, target=1).sum((1, 2)))


def test_target_matters_where_it_should(model: nn.Module, make: Make) -> None:
    method = make(model)
    same = torch.equal(method.attribute(images(), target=1), method.attribute(images(), target=2))
    assert same is (make in [METHODS[name] for name in CLASS_AGNOSTIC])


def test_callers_leaf_is_left_alone(model: nn.Module, make: Make) -> None:
    method = make(model)
    expected = method.attribute(images(), target=1)
    leaf = images().requires_grad_()
    with untouched(model, leaf):
        assert torch.equal(method.attribute(leaf, target=1), expected)
    assert leaf.grad is None
    leaf.grad = torch.ones_like(leaf)
    with untouched(model, leaf):
        method.attribute((leaf,), target=1)
    derived = leaf * 1
    with untouched(model, leaf, derived):
        assert torch.equal(method.attribute(derived, target=1), expected)
    derived.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert torch.equal(method.attribute(nn.Parameter(images()), target=1), expected)


def test_gradients_of_the_caller_stay(model: nn.Module, make: Make) -> None:
    trained = copy.deepcopy(model)
    trained(images()).sum().backward()
    with untouched(trained):
        make(trained).attribute(images(), target=1)


def test_frozen_parameters(model: nn.Module, make: Make) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    with untouched(frozen):
        attribution = make(frozen).attribute(images(), target=1)
    assert torch.equal(attribution, make(model).attribute(images(), target=1))


def test_gradient_checkpointing(make: Make) -> None:
    for build in MODELS.values():
        model = build()
        expected = make(model).attribute(images(), target=1)
        model.set_grad_checkpointing(True)
        with untouched(model):
            assert same_when_checkpointed(make, make(model).attribute(images(), target=1), expected)


def test_copies(model: nn.Module, make: Make) -> None:
    method = make(model)
    expected = method.attribute(images(), target=1)
    for copied in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert torch.equal(copied.attribute(images(), target=1), expected)


def test_users_hooks_stay_and_fire_once(make: Make) -> None:
    for model, inner in ((vit(), "blocks.0"), (swin(), "layers.0.blocks.0")):
        expected = make(model).attribute(images(), target=1)
        fired: list[str] = []

        def note(name: str, fired: list[str] = fired) -> Callable[..., None]:
            return lambda *_: fired.append(name)

        modules = {"root": model, "inner": model.get_submodule(inner), "norm": model.norm, "head": model.head}
        for name, module in modules.items():
            module.register_forward_pre_hook(note(f"before {name}"))
            module.register_forward_hook(note(f"after {name}"))
            if name != "root":  # torch warns of a backward hook on a module whose inputs need no gradient
                module.register_full_backward_hook(note(f"backward {name}"))
        with untouched(model):
            attribution = make(model).attribute(images(), target=1)
        assert torch.equal(attribution, expected)
        once = [name for name in fired if not name.startswith("backward")]
        assert len(once) == len(set(once)) * passes(make)
        assert {f"{when} {name}" for when in ("before", "after") for name in modules} <= set(fired)


def test_no_recording_outlives_the_call(model: nn.Module, make: Make) -> None:
    kept: list[weakref.ref[Tensor]] = []
    watched = copy.deepcopy(model)
    for module in watched.modules():
        module.register_forward_hook(lambda _, inputs, output: kept.append(weakref.ref(output)))
    method, image = make(watched), images()
    kept.append(weakref.ref(image))
    gc.disable()
    try:
        attribution = method.attribute(image, target=1)
        method.relevance(image, target=1)
        method.describe(image)
        del image
        alive = [ref() for ref in kept if ref() is not None]
        assert not alive
        assert attribution.abs().sum() > 0
    finally:
        gc.enable()


@contextmanager
def failing(module: nn.Module, error: BaseException) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("model", "make", "error"),
    pairwise((vit, swin), METHODS, [RuntimeError("half-way"), KeyboardInterrupt()]),
    indirect=["model", "make"],
)
def test_an_error_half_way_leaves_nothing(model: nn.Module, make: Make, error: BaseException) -> None:
    method, image = make(model), images().requires_grad_()
    expected = method.attribute(image, target=1)
    names = ("", "patch_embed", "norm", "head")
    for module in [
        *(model.get_submodule(name) for name in names),
        list(model.modules())[len(list(model.modules())) // 2],
    ]:
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), failing(module, error), untouched(model, image), pytest.raises(type(error)):
                method.attribute(image, target=1)
        assert torch.equal(method.attribute(image, target=1), expected)


def test_reused_after_an_error(model: nn.Module, make: Make) -> None:
    method, image = make(model), images()
    expected = method.attribute(image, target=1)
    for bad in (99, "x", [1]):
        with pytest.raises((IndexError, AssertionError)):
            method.attribute(image, target=bad)
        assert torch.equal(method.attribute(image, target=1), expected)


@pytest.fixture
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("name", ["lnstat", "gradient", "AttentionRollout", "FrozenLayerNorm"])
def test_threads(model: nn.Module, name: str) -> None:
    method = METHODS[name](model)
    pictures = [images(seed=seed) for seed in range(4)]
    with torch.no_grad():
        scores = [model(picture) for picture in pictures]
    expected = [method.attribute(picture, target=1) for picture in pictures]
    wrong: list[str] = []
    start = threading.Barrier(6, timeout=60)

    def explain(number: int) -> None:
        start.wait()
        for _ in range(6):
            if not torch.equal(method.attribute(pictures[number], target=1), expected[number]):
                wrong.append(f"attribution {number}")

    def fail() -> None:
        start.wait()
        for _ in range(6):
            try:
                method.attribute(pictures[0], target=99)
            except IndexError:
                continue
            wrong.append("no IndexError")

    def predict() -> None:
        start.wait()
        with torch.no_grad():
            for number in (0, 1, 2, 3, 0, 1, 2, 3):
                output = model(pictures[number])
                if not torch.equal(output, scores[number]) or output.requires_grad or torch.is_grad_enabled():
                    wrong.append("prediction")

    def guarded(function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as error:
            wrong.append(repr(error))
            raise

    threads = [threading.Thread(target=guarded, args=(explain, number)) for number in range(4)]
    threads += [threading.Thread(target=guarded, args=(function,)) for function in (fail, predict)]
    with untouched(model, *pictures):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
            assert not thread.is_alive()
    assert not wrong


@pytest.mark.usefixtures("_switch_often")
def test_a_thread_that_raises_inside_the_model(model: nn.Module) -> None:
    """Its error is its own, and the others do not notice."""
    method, image = METHODS["lnstat"](model), images()
    expected = method.attribute(image, target=1)
    unlucky: set[int] = set()
    wrong: list[str] = []

    def fail(*_: Any) -> None:
        if threading.get_ident() in unlucky:
            raise ZeroDivisionError

    def explain(bad: bool) -> None:
        if bad:
            unlucky.add(threading.get_ident())
        for _ in range(6):
            try:
                same = torch.equal(method.attribute(image, target=1), expected)
                if bad or not same:
                    wrong.append("no error" if bad else "another attribution")
            except ZeroDivisionError:
                if not bad:
                    wrong.append("error of another thread")
            except BaseException as error:
                wrong.append(repr(error))

    handle = model.norm.register_forward_pre_hook(fail)
    with untouched(model, image):
        threads = [threading.Thread(target=explain, args=(number % 2 == 1,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
            assert not thread.is_alive()
    handle.remove()
    assert not wrong


def test_compiled_module(model: nn.Module, make: Make) -> None:
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images())
    expected = make(model).attribute(images(), target=1)
    for given in (compiled, nn.DataParallel(compiled)):
        with untouched(model):
            assert torch.equal(make(given).attribute(images(), target=1), expected)
    assert torch.equal(make(lambda x: model(x), compiled).attribute(images(), target=1), expected)


@pytest.mark.parametrize("how", ["function", "function, model", "inside", "in place", "blocks"])
def test_compiled_inside_the_forward_function(how: str) -> None:
    torch._dynamo.reset()
    model = vit()
    expected = LNStatAttribution(model).attribute(images(), target=1)
    compiled: Any = torch.compile(model, backend="eager")
    method: LNStatAttribution
    if how == "function":
        method = LNStatAttribution(lambda x: compiled(x), compiled)
    elif how == "function, model":
        method = LNStatAttribution(lambda x: compiled(x), model)
    elif how == "inside":
        method = LNStatAttribution(nn.Sequential(nn.Identity(), compiled))
    elif how == "in place":
        in_place = copy.deepcopy(model)
        in_place.compile(backend="eager")
        method = LNStatAttribution(in_place)
    else:
        in_place = copy.deepcopy(model)
        for block in in_place.blocks:
            block.compile(backend="eager")
        method = LNStatAttribution(in_place)
    with untouched(model):
        assert torch.equal(method.attribute(images(), target=1), expected)


def test_describe(model: nn.Module, make: Make) -> None:
    image = images(1)
    with untouched(model, image):
        description = make(model).describe(image)
    windowed = type(model).__name__ == "SwinTransformer"
    assert description.model == type(model).__name__
    assert description.family == ("windowed" if windowed else "plain")
    assert description.grid == ((8, 8) if windowed else (4, 4))
    assert description.patch == ((4, 4) if windowed else (8, 8))
    assert description.prefix_tokens == (0 if windowed else 1)
    assert description.outputs == (1, 5)
    kinds = [step.kind for step in description.steps]
    assert kinds == (["attention"] * 2 + ["merging"] + ["attention"] * 2 if windowed else ["attention"] * 3)
    for step in description.steps:
        if step.residual is not None:
            mean, low, high = step.residual
            assert 0 <= low <= mean <= high <= 1
        assert step.name in dict(model.named_modules())
    text = str(description)
    assert all(step.name in text for step in description.steps)
    assert f"rule {description.rule}: {description.formula}" in text.splitlines()
    assert len(text.splitlines()) == 3 + len(description.steps)
    wrapped = make(nn.Sequential(Normalise(), model)).describe((image,), target=1)
    assert wrapped.grid == description.grid


def test_describe_needs_no_target(model: nn.Module, make: Make) -> None:
    method = make(model)
    assert method.describe(images()).steps == method.describe(images(), target=3).steps


def test_random_state_is_left_alone(model: nn.Module, make: Make) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make(model).attribute(images(), target=1)
    assert torch.equal(torch.rand(4), expected)


def test_a_map_that_is_zero_everywhere_is_said_to_be() -> None:
    model = vit()
    for block in model.blocks:  # nothing is added to any token, so the class token keeps what it had
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    with pytest.warns(UserWarning, match="image 0, 1 of the batch is zero everywhere") as caught:
        attribution = LNStatAttribution(model, rule="rollout").attribute(images())
    assert not attribution.any()
    assert caught[0].filename == __file__
