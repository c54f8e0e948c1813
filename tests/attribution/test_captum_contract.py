"""Every public method, on every small model, through every part of Captum that takes an attribution method."""

from __future__ import annotations

import copy
import inspect
import unittest
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any

import captum
import matplotlib as mpl
import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, GradientAttribution, LayerAttribution, NoiseTunnel, Saliency
from captum.attr import visualization as viz
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from captum.testing.helpers.basic import assertTensorAlmostEqual, assertTensorTuplesAlmostEqual
from helpers.choices import diagonal, pairwise
from helpers.contract import (
    CLASS_AGNOSTIC,
    EVERY_METHOD,
    METHODS,
    MODELS,
    PAIRS,
    WITH_A_GRAPH,
    Normalise,
    a_block,
    expected_shape,
    images,
    passes,
    untouched,
    vit,
)
from torch import Tensor, nn

from captum_lnstat import (
    RISE,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LNStatAttribution,
    RawAttention,
    ViTCX,
    patch_feature_mask,
)

mpl.use("Agg")

NOISE = ("smoothgrad", "smoothgrad_sq", "vargrad")
ONE_EACH = diagonal([*EVERY_METHOD], ["vit", "swin"])

TARGETS: dict[str, Callable[[int], Any]] = {
    "int": lambda batch: 2,
    "0-d tensor": lambda batch: torch.tensor(2),
    "1-element tensor": lambda batch: torch.tensor([2]),
    "int64 tensor": lambda batch: torch.full((batch,), 2),
    "int32 tensor": lambda batch: torch.full((batch,), 2, dtype=torch.int32),
    "list": lambda batch: [2] * batch,
    "list of tuples": lambda batch: [(2,)] * batch,
    "tuple": lambda batch: (2,),
    "numpy int": lambda batch: np.int64(2),
    "numpy uint8": lambda batch: np.uint8(2),
    "list of numpy ints": lambda batch: [np.int32(2)] * batch,
}


@cache
def model_of(name: str) -> nn.Module:
    return MODELS[name]()


def check(method: Any, attribution: Tensor, image: Tensor, grid: Tensor | None = None) -> None:
    """What Captum and its users rely on in an attribution."""
    assert type(attribution) is Tensor
    assert attribution.shape == expected_shape(method, image)
    assert attribution.dtype == image.dtype
    assert attribution.is_contiguous()
    assert not attribution.requires_grad
    assert attribution.grad_fn is None
    assert not attribution.is_inference()
    assert torch.isfinite(attribution).all()
    assert (attribution != 0).any()
    if grid is not None:
        torch.testing.assert_close(attribution.sum((1, 2, 3)), grid.sum((1, 2)).to(image.dtype), rtol=1e-4, atol=1e-5)


def grid_of(method: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Relevance on the patch grid, which the layer form has none of."""
    return None if isinstance(method, LayerLNStat) else method.relevance(*args, **kwargs)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The names of a method and of a model."""
    name, kind = request.param
    return name, kind


def pairs_and(choices: Iterable[Any]) -> list[tuple[tuple[str, str], Any]]:
    """Every method with every choice, on a model without windows or on one with them."""
    return [((name, kind), choice) for name, kind, choice in pairwise(EVERY_METHOD, ["vit", "swin"], choices)]


@pytest.fixture
def model(pair: tuple[str, str]) -> nn.Module:
    return model_of(pair[1])


@pytest.fixture
def method(pair: tuple[str, str], model: nn.Module) -> Any:
    return EVERY_METHOD[pair[0]](model)


@pytest.fixture(params=MODELS)
def each_model(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


@pytest.fixture(params=EVERY_METHOD)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return EVERY_METHOD[request.param]


@pytest.mark.parametrize("pair", list(product(EVERY_METHOD, MODELS)), ids="-".join, indirect=True)
def test_plain_call(method: Any, model: nn.Module) -> None:
    image = images(3)
    with untouched(model, image):
        attribution = method.attribute(image, target=2)
        grid = grid_of(method, image, target=2)
    check(method, attribution, image, grid)
    if grid is not None:
        assert grid.dim() == 3
        assert grid.dtype == torch.float32
    assert torch.equal(method.attribute(inputs=image, target=2), attribution)
    assert torch.equal(method.attribute(image, 2, None), attribution)


def test_target_forms(make: Callable[..., Any]) -> None:
    method, image = make(model_of("swin")), images(3)
    expected = method.attribute(image, target=2)
    for form, target in TARGETS.items():
        assert torch.equal(method.attribute(image, target=target(3)), expected), form


def test_target_forms_of_a_single_image(make: Callable[..., Any]) -> None:
    method, image = make(model_of("vit")), images(1)
    expected = method.attribute(image, target=2)
    for form, target in TARGETS.items():
        assert torch.equal(method.attribute(image, target=target(1)), expected), form


def test_one_target_an_image(method: Any) -> None:
    image, targets = images(3), [0, 4, 2]
    together = method.attribute(image, target=targets)
    for number, target in enumerate(targets):
        alone = method.attribute(image[number : number + 1], target=target)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-6)


def test_tuple_in_tuple_out(method: Any) -> None:
    image = images()
    attribution = method.attribute((image,), target=2)
    assert type(attribution) is tuple
    assert len(attribution) == 1
    assert torch.equal(attribution[0], method.attribute(image, target=2))
    grid = grid_of(method, image, target=2)
    assert grid is None or torch.equal(method.relevance((image,), target=2), grid)


@pytest.mark.parametrize(("pair", "kind"), pairs_and(NOISE), indirect=["pair"])
def test_noise_tunnel(method: Any, model: nn.Module, kind: str) -> None:
    image = images()
    with untouched(model, image), torch.random.fork_rng():  # the noise itself is Captum's
        attribution = NoiseTunnel(method).attribute(image, nt_type=kind, nt_samples=3, stdevs=0.1, target=[1, 2])
    check(method, attribution, image)


def test_noise_tunnel_with_delta(each_model: nn.Module) -> None:
    for contrastive in (False, True):
        evidence = LNStatAttribution(each_model, rule="evidence", contrastive=contrastive)
        for kind in NOISE:
            attribution, delta = NoiseTunnel(evidence).attribute(
                images(), nt_type=kind, nt_samples=3, target=1, return_convergence_delta=True
            )
            check(evidence, attribution, images())
            assert delta.shape == (2 * 3,)
            assert delta.abs().max() < 1e-4


def test_noise_tunnel_with_a_delta_that_there_is_not(make: Callable[..., Any]) -> None:
    # NoiseTunnel asks for it all the same; averaged as if it were an attribution it would be a wrong picture.
    method = make(model_of("vit"))
    if not method.has_convergence_delta():
        with pytest.raises((ValueError, TypeError), match="delta"):
            NoiseTunnel(method).attribute(images(), nt_samples=2, target=1, return_convergence_delta=True)


def test_noise_tunnel_in_batches_of_samples(method: Any) -> None:
    check(
        method, NoiseTunnel(method).attribute((images(),), nt_samples=5, nt_samples_batch_size=2, target=1)[0], images()
    )


@pytest.mark.parametrize(("pair", "multiply"), pairs_and([True, False]), indirect=["pair"])
def test_infidelity(method: Any, model: nn.Module, multiply: bool) -> None:
    @infidelity_perturb_func_decorator(multiply_by_inputs=multiply)
    def perturb(inputs: Tensor) -> Tensor:
        return inputs + 0.1 * torch.randn_like(inputs)

    image = images()
    attribution = method.attribute(image, target=1)
    if isinstance(method, LayerLNStat):
        # Infidelity multiplies an attribution with changes of the input: one of a layer has another shape.
        with pytest.raises(AssertionError, match="matching shapes"):
            infidelity(model, perturb, image, attribution, target=1, n_perturb_samples=3)
        return
    for normalize in (False, True):
        score = infidelity(model, perturb, image, attribution, target=1, n_perturb_samples=3, normalize=normalize)
        assert score.shape == (2,)
        assert torch.isfinite(score).all()


@pytest.mark.parametrize(("pair", "batch"), pairs_and([1, 3]), indirect=["pair"])
def test_sensitivity_max(method: Any, batch: int) -> None:
    image = images(batch)
    score = sensitivity_max(method.attribute, image, target=1, n_perturb_samples=10)
    assert score.shape == (batch,)
    assert torch.isfinite(score).all()
    assert (score > 0).all()
    a_tenth = sensitivity_max(method.attribute, (image,), target=[1] * batch, perturb_radius=0.002)
    assert (a_tenth < score).all()


def to_the_image(method: Any, attribution: Tensor) -> Tensor:
    """Attributions to a layer as Captum brings them to the image's size: channels first, then its interpolate."""
    if not isinstance(method, LayerLNStat):
        return attribution
    if attribution.dim() == 3:
        attribution = attribution[:, -16:].unflatten(1, (4, 4))
    return LayerAttribution.interpolate(attribution.permute(0, 3, 1, 2).sum(1, keepdim=True), (32, 32))


@pytest.mark.parametrize("pair", ONE_EACH, ids="-".join, indirect=True)
def test_visualize(method: Any) -> None:
    image = images(1)
    picture = image[0].permute(1, 2, 0).sigmoid().numpy()
    # A map may be small all over, as a small model's is; one of zeros would stay one.
    attribution = 1e3 * to_the_image(method, method.attribute(image, target=1))[0].permute(1, 2, 0).numpy()
    for kind, sign in (("heat_map", "all"), ("blended_heat_map", "absolute_value"), ("masked_image", "absolute_value")):
        viz.visualize_image_attr(attribution, picture, method=kind, sign=sign, use_pyplot=False)
    viz.visualize_image_attr_multiple(
        attribution, picture, ["original_image", "heat_map"], ["all", "all"], show_colorbar=True, use_pyplot=False
    )


def test_lnstat_has_something_positive_for_every_class(each_model: nn.Module) -> None:
    image = images(5)
    for target in range(5):
        attribution = LNStatAttribution(each_model).attribute(image, target=target)
        assert (attribution >= 0).all()
        assert (attribution.amax((1, 2, 3)) > 0).all()


MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)


@pytest.mark.parametrize(("pair", "mode"), pairs_and(MODES), indirect=["pair"])
def test_callers_grad_mode(method: Any, model: nn.Module, mode: Callable[[], Any]) -> None:
    image = images()
    expected = method.attribute(image, target=1)
    with mode(), untouched(model, image):
        attribution = method.attribute(image, target=1)
    check(method, attribution, image)
    assert torch.equal(attribution, expected)


def test_images_made_in_inference_mode(method: Any, model: nn.Module) -> None:
    with torch.inference_mode():
        image = images()
    with untouched(model, image):
        attribution = method.attribute(image, target=1)
    assert image.is_inference()
    assert torch.equal(attribution, method.attribute(images(), target=1))


def test_autocast(method: Any, model: nn.Module) -> None:
    image = images()
    expected = method.attribute(image, target=1)
    with torch.autocast("cpu", torch.bfloat16), untouched(model, image):
        attribution = method.attribute(image, target=1)
    check(method, attribution, image)
    assert (attribution - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("method_name", CLASS_AGNOSTIC)
def test_mass_is_conserved_under_autocast(method_name: str) -> None:
    method = METHODS[method_name](model_of("swin"))
    with torch.autocast("cpu", torch.bfloat16):
        grid = method.relevance(images())
    torch.testing.assert_close(grid.sum((1, 2)), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pair", "layout"), pairs_and(["channels_last", "expanded", "transposed", "sliced"]), indirect=["pair"]
)
def test_memory_layouts(method: Any, layout: str) -> None:
    plain = images()
    if layout == "channels_last":
        image = plain.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        image = plain[:1, :1].expand(2, 3, -1, -1)
    elif layout == "transposed":
        image = plain.transpose(2, 3)
    else:
        image = images(4)[::2]
    before = image.stride()
    attribution = method.attribute(image, target=1)
    assert image.stride() == before
    check(method, attribution, image)
    assert torch.equal(attribution, method.attribute(image.contiguous(), target=1))
    if layout == "channels_last":
        assert torch.isfinite(sensitivity_max(method.attribute, image, target=1, n_perturb_samples=2)).all()


@pytest.mark.parametrize(
    ("pair", "dtype"), pairs_and([torch.float16, torch.bfloat16, torch.float64]), indirect=["pair"]
)
def test_model_dtypes(pair: tuple[str, str], method: Any, model: nn.Module, dtype: torch.dtype) -> None:
    expected = method.attribute(images(), target=1)
    model = copy.deepcopy(model).to(dtype)
    method = EVERY_METHOD[pair[0]](model)
    for image_dtype in (dtype, torch.float32):
        image = images().to(image_dtype)
        with untouched(model, image):
            attribution = method.attribute(image, target=1)
        check(method, attribution, image)
        loose = 1e-4 if dtype == torch.float64 else 0.15
        assert (attribution.float() - expected).norm() < loose * expected.norm()
    grid = grid_of(method, images().to(dtype), target=1)
    assert grid is None or grid.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(method, NoiseTunnel(method).attribute(images(), nt_samples=2, target=1), images())


def test_captum_hands_float32_to_half_models(make: Callable[..., Any]) -> None:
    model = copy.deepcopy(model_of("swin")).bfloat16()
    method, image = make(model), images().bfloat16()
    with pytest.raises(RuntimeError):  # Captum's own cannot do this: they pass the float32 noise on to the model
        NoiseTunnel(Saliency(model)).attribute(image, nt_samples=2, target=1)
    attribution = NoiseTunnel(method).attribute(image, nt_samples=2, target=1)
    assert torch.isfinite(attribution).all()
    assert torch.isfinite(sensitivity_max(method.attribute, image, target=1, n_perturb_samples=2)).all()


def test_what_captum_asks_of_a_method(make: Callable[..., Any]) -> None:
    model = model_of("vit")
    method = make(model)
    assert isinstance(method, GradientAttribution)
    assert method.forward_func is model
    assert method.multiplies_by_inputs is True
    assert isinstance(type(method).get_name(), str)
    assert hasattr(type(method).attribute, "__wrapped__")
    assert torch.equal(
        type(method).attribute.__wrapped__(method, images(), target=1), method.attribute(images(), target=1)
    )
    with pytest.raises(NotImplementedError, match="attribute_future is not implemented for"):
        method.attribute_future()
    names = list(inspect.signature(method.attribute).parameters)
    assert names[:3] == ["inputs", "target", "additional_forward_args"]
    assert not {"baselines", "feature_mask", "perturbations_per_eval", "show_progress"} & set(names)
    declared = "return_convergence_delta" in names and getattr(method, "rule", None) == "evidence"
    assert method.has_convergence_delta() is declared


def test_names() -> None:
    assert LNStatAttribution.get_name() == "LN Stat"
    assert RawAttention.get_name() == "Raw Attention"
    assert AttentionRollout.get_name() == "Attention Rollout"
    assert FrozenLayerNorm.get_name() == "Frozen LayerNorm"
    assert GenericAttention.get_name() == "Generic Attention"
    assert BeyondIntuition.get_name() == "Beyond Intuition"
    assert RISE.get_name() == "RISE"
    assert ViTCX.get_name() == "ViT-CX"


def test_what_the_options_go_with_cannot_be_set() -> None:
    """The share and the fusion are those of the rule given: another rule on them would be none of the documented."""
    method = LNStatAttribution(model_of("vit"), rule="gradient", normalized=False)
    assert (method.rule, method.normalized) == ("gradient", False)
    for name, value in (("rule", "rollout"), ("normalized", True)):
        with pytest.raises(AttributeError, match=f"{name}.*no setter"):
            setattr(method, name, value)


def test_convergence_delta(each_model: nn.Module) -> None:
    image = images(3)
    for contrastive in (False, True):
        evidence = LNStatAttribution(each_model, rule="evidence", contrastive=contrastive)
        attribution, delta = evidence.attribute(image, target=[0, 1, 2], return_convergence_delta=True)
        check(evidence, attribution, image)
        assert delta.shape == (3,)
        assert delta.dtype == torch.float32
        assert not delta.requires_grad
        assert delta.abs().max() < 1e-4
        (inside,), again = evidence.attribute((image,), target=[0, 1, 2], return_convergence_delta=True)
        assert torch.equal(inside, attribution)
        assert torch.equal(again, delta)


@pytest.mark.parametrize("rule", ["lnstat", "rollout", "gradient"])
def test_no_delta_without_completeness(rule: Any) -> None:
    method = LNStatAttribution(model_of("vit"), rule=rule)
    with pytest.raises(ValueError, match="no convergence delta"):
        method.attribute(images(), target=1, return_convergence_delta=True)


def test_inherited_compute_convergence_delta_is_not_on_offer() -> None:
    method = LNStatAttribution(model_of("vit"), rule="evidence")
    image = images()
    attribution = method.attribute(image, target=1)
    with pytest.raises(NotImplementedError):
        method.compute_convergence_delta(attribution, torch.zeros_like(image), image, target=1)


class TestWithCaptumsHelpers(unittest.TestCase):
    """Captum's own assertions on its own argument forms."""

    def test_same_in_every_form(self) -> None:
        image = images(3)
        for name, make in METHODS.items():
            method = make(model_of("swin"))
            alone = torch.cat([method.attribute(image[i : i + 1], target=i) for i in range(3)])
            listed = method.attribute(image, target=[0, 1, 2])
            assertTensorAlmostEqual(self, listed, alone, delta=1e-5, mode="max")
            tensor = method.attribute((image,), target=torch.tensor([0, 1, 2]))
            assertTensorTuplesAlmostEqual(self, tensor, (listed,), delta=0.0, mode="max")
            with self.subTest(name), pytest.raises(AssertionError):
                method.attribute(image, target=(9999,) * 20)

    def test_hook_removal(self) -> None:
        # As Captum's generated test_hook_removal: an error in every module in turn. test_state.py has it for others.
        model = copy.deepcopy(model_of("swin"))
        method = METHODS["FrozenLayerNorm"](model)
        for module in list(model.modules()):
            handle = module.register_forward_hook(_fail)
            with untouched(model):
                try:
                    method.attribute(images(1), target=1)
                except ZeroDivisionError:
                    pass
                else:
                    assert not _ran(module, model), f"{type(module).__name__} ran and raised nothing"
            handle.remove()


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def _ran(module: nn.Module, model: nn.Module) -> bool:
    ran = []
    handle = module.register_forward_pre_hook(lambda *_: ran.append(1))
    module_hooks = dict(module._forward_hooks)
    module._forward_hooks.clear()
    with torch.no_grad():
        model(images(1))
    module._forward_hooks.update(module_hooks)
    handle.remove()
    return bool(ran)


@cache
def ablated(name: str) -> tuple[Tensor, Tensor]:
    """The patches of a model, and what FeatureAblation finds on them."""
    model = model_of(name)
    mask = patch_feature_mask(model, 32)
    return mask, FeatureAblation(model).attribute(images(), target=[1, 2], feature_mask=mask, perturbations_per_eval=8)


@pytest.mark.parametrize("name", MODELS)
def test_patches_as_features(name: str) -> None:
    (mask, ablation), model, image = ablated(name), model_of(name), images()
    assert ablation.shape == image.shape
    for patch in (0, 5, int(mask.max())):
        inside = mask == patch
        with torch.no_grad():
            drop = (model(image) - model(image.masked_fill(inside, 0)))[[0, 1], [1, 2]]
        values = ablation.flatten(2)[:, :, inside.flatten()]
        torch.testing.assert_close(values, drop[:, None, None].expand_as(values), rtol=1e-4, atol=1e-5)


def test_ablation_takes_the_same_arguments(pair: tuple[str, str], method: Any) -> None:
    """And its features are the patches on which relevance is given, so that the two can be compared one by one."""
    (mask, ablation), image = ablated(pair[1]), images()
    attribution = to_the_image(method, method.attribute(image, target=[1, 2]))
    assert attribution.shape[-2:] == ablation.shape[-2:]
    if isinstance(method, LayerLNStat):
        return
    method.interpolation = "nearest"
    pixels = method.attribute(image, target=[1, 2]).sum(1).flatten(1)
    patches = torch.zeros(2, int(mask.max()) + 1).index_add_(1, mask.flatten(), pixels)
    torch.testing.assert_close(patches, method.relevance(image, target=[1, 2]).flatten(1), rtol=1e-4, atol=1e-5)


def test_additional_forward_args(make: Callable[..., Any]) -> None:
    model, image = model_of("vit"), images()
    seen: list[tuple[Any, ...]] = []

    def forward(x: Tensor, scale: Tensor, flag: bool, *rest: Any) -> Tensor:
        seen.append((scale, flag, *rest))
        return model(x) * scale

    method = make(forward, model)
    args = (torch.full((2, 1), 2.0), True)
    attribution = method.attribute(image, 1, args)
    check(method, attribution, image, grid_of(method, image, 1, args))
    assert seen[0][1] is True
    check(method, NoiseTunnel(method).attribute(image, nt_samples=3, target=1, additional_forward_args=args), image)
    assert seen[-1][0].shape == (6, 1)
    single = torch.full((2, 1), 2.0)
    check(method, make(lambda x, scale: model(x) * scale, model).attribute(image, 1, single), image)


def test_forward_functions(make: Callable[..., Any]) -> None:
    model, image = model_of("swin"), images()
    expected = make(model).attribute(image, target=1)
    wrapped = nn.DataParallel(model)

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class HuggingFaceLike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, x: Tensor) -> Output:
            return Output(self.backbone(x))

    for forward, given in (
        (lambda x: model(x), model),
        (lambda x: model.forward(x), model),
        (lambda x: model.forward_head(model.forward_features(x)), model),
        (wrapped, None),
        (lambda x: wrapped(x), wrapped),
        (nn.Sequential(model), None),
        (nn.Sequential(nn.Identity(), wrapped), None),
        (HuggingFaceLike(), None),
        (lambda x: Output(model(x)), model),
    ):
        assert torch.equal(make(forward, given).attribute(image, target=1), expected)
    for squash in (torch.softmax, torch.log_softmax):
        squashed = make(lambda x, squash=squash: squash(model(x), -1), model)
        check(squashed, squashed.attribute(image, target=1), image)
    normalised = make(nn.Sequential(Normalise(), model)).attribute(image, target=1)
    plain = make(model).attribute(Normalise()(image), target=1)
    if make is FrozenLayerNorm:  # input times gradient, of the input before it is normalised
        plain = plain * 1.5 * image / Normalise()(image)
    if passes(make) == 1:  # on a way from zero, images that are normalised later are others than those that were before
        torch.testing.assert_close(normalised, plain, rtol=1e-4, atol=1e-6)
    one_score = make(lambda x: model(x)[:, 1], model)
    if getattr(one_score, "contrastive", False):
        with pytest.raises(ValueError, match="contrastive=False"):
            one_score.attribute(image)
    else:
        torch.testing.assert_close(one_score.attribute(image), expected, rtol=1e-4, atol=1e-6)


def test_forward_func_is_read_at_call_time(make: Callable[..., Any]) -> None:
    model = model_of("vit")
    method = copy.copy(make(model))
    method.forward_func = lambda x: 2 * model(x)
    check(method, method.attribute(images(), target=1), images())


def test_forward_func_reassigned_to_another_model(make: Callable[..., Any]) -> None:
    first, second = model_of("vit"), vit(seed=5)
    method = copy.copy(make(first))
    method.forward_func = second
    if isinstance(method, LayerLNStat):
        method.layer = a_block(second)
    assert torch.equal(method.attribute(images(), target=1), make(second).attribute(images(), target=1))


@pytest.mark.parametrize("method_name", WITH_A_GRAPH)
def test_forward_func_that_normalises_in_place(method_name: str) -> None:
    model, image = model_of("vit"), images()
    method = METHODS[method_name](nn.Sequential(Normalise(inplace=True), model))
    plain = METHODS[method_name](nn.Sequential(Normalise(), model))
    torch.testing.assert_close(method.attribute(image, target=1), plain.attribute(image, target=1))


def test_captum_version() -> None:
    assert tuple(map(int, captum.__version__.split(".")[:2])) >= (0, 9)
