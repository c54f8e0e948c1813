"""The subjects of Captum's contract that are about one public call each: warnings, options, wrappers, properties."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from helpers.choices import diagonal, pairwise
from helpers.contract import (
    METHODS,
    WITH_A_GRAPH,
    Normalise,
    a_block,
    distilled,
    images,
    same_when_checkpointed,
    swin,
    untouched,
    vit,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import captum_lnstat
from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError

Make = Callable[..., Any]


# Warnings point at the line of whoever called.


def _where(call: Callable[[], Any]) -> list[tuple[str, int]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(issubclass(warning.category, UserWarning) for warning in caught)
    return [(Path(warning.filename).name, warning.lineno) for warning in caught]


def _line(call: Callable[[], Any]) -> int:
    return call.__code__.co_firstlineno


@pytest.mark.parametrize(
    ("make", "wrap"), diagonal(METHODS, ["plain", "no_grad", "compiled", "DataParallel", "callable"]), indirect=["make"]
)
def test_train_mode_warns_at_the_callers_line(make: Make, wrap: str) -> None:
    model, image = vit().train(), images(1)
    given: Any = {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "DataParallel": lambda: nn.DataParallel(model),
    }.get(wrap, lambda: model)()
    method = make(lambda x: model(x), model) if wrap == "callable" else make(given)
    attribute = torch.no_grad()(method.attribute) if wrap == "no_grad" else method.attribute
    attribution = lambda: attribute(image, target=1)  # noqa: E731
    relevance = lambda: method.relevance(image, target=1)  # noqa: E731
    description = lambda: method.describe(image)  # noqa: E731
    chunked = lambda: method.attribute(image, target=1, internal_batch_size=1)  # noqa: E731
    for call in (attribution, relevance, description, chunked):
        assert _where(call) == [(Path(__file__).name, _line(call))]


def test_the_layer_form_warns_at_the_callers_line() -> None:
    model, image = vit().train(), images(1)
    layer = LayerLNStat(model, model.blocks[-1])
    call = lambda: layer.attribute(image, target=1)  # noqa: E731
    assert _where(call) == 2 * [(Path(__file__).name, _line(call))]  # train mode, and nothing left to look at
    model.eval()
    assert _where(call) == [(Path(__file__).name, _line(call))]


def test_noise_tunnel_warns_at_the_callers_line(make: Make) -> None:
    method, image = NoiseTunnel(make(vit().train())), images(1).requires_grad_()
    call = lambda: method.attribute(image, nt_samples=2, target=1)  # noqa: E731
    assert _where(call) == [(Path(__file__).name, _line(call))]


def test_a_warning_in_a_script_names_the_script(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(
        "import torch, timm\n"
        "from captum_lnstat import LNStatAttribution\n"
        "model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1).train()\n"
        "LNStatAttribution(model).attribute(torch.randn(1, 3, 32, 32), target=1)\n"
    )
    package = str(Path(captum_lnstat.__file__).parents[1])
    environment = {"PYTHONPATH": package, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    assert f"{script}:4: UserWarning: VisionTransformer is in train mode" in done.stderr


# An option that the rule ignores is refused.

IGNORED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "residual": ("update", ()),
    "head_fusion": ("max", ("gradient",)),
    "contrastive": (True, ("rollout",)),
    "normalized": (False, ("lnstat", "evidence", "rollout")),
}
RULES = ("lnstat", "evidence", "rollout", "gradient")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("option", IGNORED)
def test_an_option_has_an_effect_or_is_refused(model: nn.Module, option: str, rule: Any) -> None:
    value, ignored = IGNORED[option]
    if rule in ignored:
        with pytest.raises(ValueError, match=rf"{option} does nothing with rule='{rule}'; expected rule=") as raised:
            LNStatAttribution(model, rule=rule, **{option: value})
        assert all(repr(other) in str(raised.value) for other in RULES if other not in ignored)
        return
    image = images()
    plain = LNStatAttribution(model, rule=rule).attribute(image, target=1)
    changed = LNStatAttribution(model, rule=rule, **{option: value}).attribute(image, target=1)
    assert not torch.allclose(changed, plain, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_the_defaults_said_in_full_are_no_mistake(model: nn.Module, rule: Any) -> None:
    LNStatAttribution(
        model,
        rule=rule,
        residual="deviation",
        head_fusion=None,
        merging="variance",
        contrastive=False,
        normalized=True,
    )


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("rollout", {"contrastive": True}),
        ("rollout", {"evidence_residual": "half"}),
    ],
)
def test_the_layer_form_refuses_them_too(rule: Any, options: dict[str, Any]) -> None:
    model = vit()
    with pytest.raises(ValueError, match=f"{next(iter(options))} does nothing with rule='{rule}'"):
        LayerLNStat(model, model.blocks[0], rule=rule, **options)


def test_merging_matters_where_there_is_one() -> None:
    image = images()
    for build, matters in ((vit, False), (swin, True)):
        both = [LNStatAttribution(build(), merging=m).attribute(image, target=1) for m in ("variance", "uniform")]
        assert torch.equal(*both) is not matters


@pytest.mark.parametrize("given", ["model", 3, None])
def test_a_model_that_is_none(make: Make, given: Any) -> None:
    with pytest.raises(TypeError, match=r"forward_func is a .*; expected the model, or a function"):
        make(given)
    if given is not None:
        with pytest.raises(TypeError, match=r"model is a .*; expected the module that forward_func runs"):
            make(vit(), given)


# What Captum reads off a method, for each rule and baseline.


@pytest.mark.parametrize("name", METHODS)
def test_delta_is_declared_where_it_is_given(name: str) -> None:
    method, image = METHODS[name](vit()), images(3)
    if not method.has_convergence_delta():
        with pytest.raises((ValueError, TypeError), match=r"no convergence delta|return_convergence_delta"):
            method.attribute(image, target=1, return_convergence_delta=True)
    else:
        assert name == "evidence"
        attributions, delta = method.attribute((image,), target=1, return_convergence_delta=True)
        assert type(attributions) is tuple
        assert delta.shape == (3,)
    with pytest.raises(NotImplementedError, match=r"LNStatAttribution\(\.\.\., rule='evidence'\)"):
        method.compute_convergence_delta(image, image)
    with pytest.raises(NotImplementedError, match=f"not implemented for {type(method).__name__}$"):
        method.attribute_future()
    assert method.multiplies_by_inputs is True


def test_layer_form_declares_no_delta() -> None:
    model = vit()
    layer = LayerLNStat(model, model.blocks[0], rule="evidence")
    assert layer.has_convergence_delta() is False
    assert layer.multiplies_by_inputs is True
    assert "return_convergence_delta" not in inspect.signature(layer.attribute).parameters
    with pytest.raises(NotImplementedError, match="biases and padded places"):
        layer.compute_convergence_delta(images(), images())
    with pytest.raises(NotImplementedError, match=r"not implemented for LayerLNStat$"):
        layer.attribute_future()


@pytest.mark.parametrize("name", METHODS)
def test_relevance_is_a_contribution(name: str) -> None:
    """multiplies_by_inputs: twice the head's weights is twice what a patch contributed, and twice the map."""
    once, twice = vit(), vit()
    with torch.no_grad():
        twice.head.weight.mul_(2)
        twice.head.bias.mul_(2)
    first, second = (METHODS[name](m).relevance(images(), target=1) for m in (once, twice))
    power = 0 if name in ("rollout", "RawAttention", "AttentionRollout") else 1
    if name == "gradient":  # rows that are divided by their sums do not know how large the score is
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
        return
    if name == "GenericAttention":  # r + r A' over several blocks: a polynomial in the weights
        assert (second > first).any()
        return
    torch.testing.assert_close(second, first * 2**power, rtol=1e-4, atol=1e-5)


# Wrappers around the model.


# Compiled models are in ``test_attribution.test_compiled_module``.
@pytest.mark.parametrize(
    ("model", "make", "given"),
    pairwise((vit, swin), METHODS, ["DataParallel", "blocks", "sequential"]),
    indirect=["model", "make"],
)
def test_wrapped_models_give_the_same_bits(model: nn.Module, make: Make, given: str) -> None:
    _check_wrapped(model, make, given)


def test_a_compiled_model_in_data_parallel_gives_the_same_bits(model: nn.Module) -> None:
    _check_wrapped(model, LNStatAttribution, "both")


def _check_wrapped(model: nn.Module, make: Make, given: str) -> None:
    torch._dynamo.reset()
    expected, image = make(model).attribute(images(), target=1), images()
    wrapped: Any = copy.deepcopy(model)
    if given in ("compiled", "both"):
        wrapped = torch.compile(wrapped, backend="eager")
        with torch.no_grad():
            wrapped(image)  # warm: the compiled code is there to be run
    elif given == "blocks":
        for block in wrapped.modules():
            if hasattr(block, "attn"):
                block.compile(backend="eager")
    if given in ("DataParallel", "both"):
        wrapped = nn.DataParallel(wrapped)
    elif given == "sequential":
        wrapped = nn.Sequential(nn.Identity(), nn.DataParallel(wrapped))
    with untouched(model):
        assert torch.equal(make(wrapped).attribute(image, target=1), expected)


def test_checkpointing_gives_the_same_map(model: nn.Module, make: Make) -> None:
    """Of the whole model; that of its blocks is in ``test_attribution.test_gradient_checkpointing``."""
    expected = make(model).attribute(images(), target=1)
    inside = copy.deepcopy(model)
    method = make(lambda x: checkpoint(inside, x, use_reentrant=False), inside)
    with untouched(inside):
        assert same_when_checkpointed(make, method.attribute(images(), target=1), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["lnstat", "evidence", *WITH_A_GRAPH])
def test_reentrant_checkpointing_of_the_whole_model_is_refused(model: nn.Module, name: str) -> None:
    method = METHODS[name](lambda x: checkpoint(model, x, use_reentrant=True), model)
    with untouched(model), pytest.raises(RecordingError, match="re-entrant checkpointing"):
        method.attribute(images(), target=1)


# Backward hooks of the user.


def test_a_backward_hook_on_the_root(model: nn.Module, make: Make) -> None:
    """Torch says that the hook sees no gradient of the input, since there is none; the numbers are the same."""
    hooked = copy.deepcopy(model)
    fired: list[int] = []
    hooked.register_full_backward_hook(lambda *_: fired.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with untouched(hooked):
            attribution = make(hooked).attribute(images(), target=1)
    assert torch.equal(attribution, make(model).attribute(images(), target=1))
    with_a_graph = make in [METHODS[name] for name in WITH_A_GRAPH]
    texts = [str(warning.message) for warning in caught]
    # Where the pooling of the head is read off its gradient, the head is differentiated once more.
    assert ["Full backward hook is firing" in text for text in texts] in (
        [[]] if with_a_graph else [[True], [True, True]]
    )
    assert len(fired) <= 2


# Several outputs.

# Their map of the mean of two scores, or from two starts, is the mean of the maps.
LINEAR = ("evidence", "rollout", "AttentionRollout", "RawAttention", "FrozenLayerNorm")


@pytest.mark.filterwarnings("ignore:.*train mode")
def test_distilled_model_in_training(make: Make) -> None:
    model, image = distilled(), images()
    expected = make(model).attribute(image, target=1)
    model.set_distilled_training(True)
    model.train()
    method = make(model)
    with pytest.raises(TypeError, match=r"tuple of \{0: \(2, 5\), 1: \(2, 5\)\}.*output="):
        method.attribute(image, target=1)
    parts = []
    for one_head in (0, 1):
        method.output = one_head
        parts.append(method.attribute(image, target=1))
    assert not torch.allclose(*parts)
    if method.get_name() in LINEAR or getattr(method, "rule", "") in LINEAR:
        torch.testing.assert_close((parts[0] + parts[1]) / 2, expected)
    method.output = lambda scores: (scores[0] + scores[1]) / 2
    torch.testing.assert_close(method.attribute(image, target=1), expected)


class HuggingFaceOutput(dict):
    """Attribute, key and position, as transformers' ModelOutput."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def test_logits_of_an_output_object(model: nn.Module, make: Make) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, pixel_values: Tensor) -> HuggingFaceOutput:
            return HuggingFaceOutput(loss=None, logits=self.backbone(pixel_values), hidden_states=None)

    assert torch.equal(
        make(nn.Sequential(Normalise(), Classifier())).attribute(images(), target=1),
        make(nn.Sequential(Normalise(), model)).attribute(images(), target=1),
    )


@pytest.mark.parametrize("kind", ["image", "layer"])
def test_options_that_will_go_warn_and_still_work(model: nn.Module, kind: str) -> None:
    image = images()

    def make(**options: Any) -> Any:
        if kind == "image":
            return LNStatAttribution(model, rule="evidence", **options)
        return LayerLNStat(model, a_block(model), rule="evidence", **options)

    with pytest.warns(FutureWarning, match="evidence_residual is deprecated"):
        old = make(evidence_residual="half")
    assert torch.equal(old.attribute(image, target=1), make(residual="half").attribute(image, target=1))
    with pytest.warns(FutureWarning, match="residual='ratio' is deprecated"):
        make(residual="ratio").attribute(image, target=1)
