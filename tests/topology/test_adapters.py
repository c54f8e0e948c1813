"""Wrappers and adapters: the model inside is found, and what stands for a Linear is taken for what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.contract import distilled, images, lively, swin, swin_v2, untouched, vit
from timm.layers import Mlp
from timm.models.hiera import Hiera
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import SwinTransformer, VisionTransformer
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.topology import find_topology
from captum_lnstat.topology.anatomy.projections import projections

RULES = ("lnstat", "evidence", "rollout", "gradient")
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def hiera() -> nn.Module:
    torch.manual_seed(0)
    return lively(
        Hiera((32, 32), embed_dim=16, num_heads=1, stages=(1, 1), q_pool=1, num_classes=5, patch_stride=(2, 2))
    )


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    config.num_labels = 5
    return lively(ViTForImageClassification(config))


def hf_swin() -> nn.Module:
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5)
    return lively(SwinForImageClassification(config))


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    return lively(model)


def torchvision_swin() -> nn.Module:
    torch.manual_seed(0)
    return lively(SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5))


def maps(model: nn.Module, rule: str = "lnstat") -> Tensor:
    return LNStatAttribution(model, rule=rule).attribute(images(), target=[0, 1])


def assert_same(one: nn.Module, other: nn.Module, rules: tuple[str, ...] = RULES, tolerance: float = 1e-5) -> None:
    """The maps of both by several rules, relative to their largest value."""
    for rule in rules:
        found, expected = maps(one, rule), maps(other, rule)
        assert expected.abs().amax() > 0
        assert (found - expected).abs().amax() <= tolerance * expected.abs().amax(), rule


def assert_complete(model: nn.Module) -> None:
    """What the evidence at the pixels, and in the constant, is short of the score."""
    method = LNStatAttribution(model, rule="evidence")
    _, delta = method.attribute(images(), target=[1, 2], return_convergence_delta=True)
    with torch.no_grad():
        returned = model(images())
    score = getattr(returned, "logits", returned)[[0, 1], [1, 2]]
    assert (delta.abs() <= 1e-4 * score.abs().clamp(min=1)).all()


# Wrappers ---------------------------------------------------------------------------------------


class Delegates(nn.Module):
    """Has every attribute of what it holds, as peft's and many users' wrappers do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class Properties(nn.Module):
    """Has the parts of what it holds as properties."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.backbone = inside

    patch_embed = property(lambda self: self.backbone.patch_embed)
    blocks = property(lambda self: self.backbone.blocks)
    norm = property(lambda self: self.backbone.norm)
    num_prefix_tokens = property(lambda self: self.backbone.num_prefix_tokens)
    global_pool = property(lambda self: self.backbone.global_pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


@pytest.mark.parametrize("wrap", [Delegates, Properties, lambda m: Delegates(Delegates(m)), lambda m: Properties(m)])
@pytest.mark.parametrize("make", [vit, distilled])
def test_a_wrapper_with_the_attributes_of_what_it_holds(make: Callable[[], nn.Module], wrap: Any) -> None:
    model = make()
    wrapped = wrap(model)
    for rule in RULES:
        assert torch.equal(maps(wrapped, rule), maps(model, rule))
    layer = model.blocks[0]
    expected = LayerLNStat(model, layer).attribute(images(), target=1)
    assert torch.equal(LayerLNStat(wrapped, layer).attribute(images(), target=1), expected)
    assert find_topology(wrapped).model is model


@pytest.mark.parametrize("make", [swin, swin_v2, hf_vit, torchvision_swin])
def test_a_wrapper_of_another_family(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert torch.equal(maps(Delegates(model)), maps(model))


def test_a_wrapper_of_a_compiled_model_does_what_it_does() -> None:
    """The attribute that the compiled model is known by is passed on too; the wrapper has a part of its own."""

    class Doubles(Delegates):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inside(x)

    model = vit()
    wrapped = Doubles(torch.compile(model, backend="eager"))
    evidence = maps(wrapped, "evidence")
    assert torch.allclose(evidence, 2 * maps(model, "evidence"), rtol=1e-4, atol=1e-6)


# Adapters from scratch --------------------------------------------------------------------------


class LowRankParameters(nn.Module):
    """LoRA around a Linear: two matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(base.in_features, 4) / 8)
        self.B = nn.Parameter(torch.randn(4, base.out_features) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * (x @ self.A @ self.B)

    def merged(self) -> Tensor:
        return self.base.weight + 2 * (self.A @ self.B).T


class LowRankLinears(nn.Module):
    """LoRA around a Linear: two Linears, in a module of their own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.linear = base
        self.lora = nn.Sequential(
            nn.Linear(base.in_features, 4, bias=False),
            nn.Dropout(0.1),
            nn.Linear(4, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)

    def merged(self) -> Tensor:
        return self.linear.weight + self.lora[2].weight @ self.lora[0].weight


class LowRankSubclass(nn.Linear):
    """LoRA as a Linear with more parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T

    def merged(self) -> Tensor:
        return self.weight + self.up @ self.down


class Magnitudes(LowRankLinears):
    """DoRA: LoRA with rows of a length of their own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(1 + torch.rand(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.linear.bias)

    def merged(self) -> Tensor:
        weight = super().merged()
        return self.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)


def replaced(model: nn.Module, names: tuple[str, ...], make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of a model with other modules in the place of some Linears."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    found = [name for name, part in model.named_modules() if name.endswith(names) and isinstance(part, nn.Linear)]
    assert found
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return model.eval()


def merged(model: nn.Module, kind: Any) -> nn.Module:
    """A copy with the adapters merged into plain Linears."""
    model = copy.deepcopy(model)
    for name, part in list(model.named_modules()):
        if type(part) is kind:
            plain = nn.Linear(*part.merged().T.shape)
            base = next((child for child in part.children() if isinstance(child, nn.Linear)), part)
            plain.weight.data, plain.bias.data = part.merged().detach(), base.bias.detach()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


ADAPTERS = (LowRankParameters, LowRankLinears, LowRankSubclass, Magnitudes)


@pytest.mark.parametrize("names", [LINEARS, ("attn.proj",)], ids=["all", "proj"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_from_scratch_is_the_merged_model(kind: Any, names: tuple[str, ...]) -> None:
    adapted = replaced(vit(), names, kind)
    with untouched(adapted):
        found = maps(adapted)
    assert not torch.allclose(found, maps(vit()), rtol=1e-2)  # it does something
    assert_same(adapted, merged(adapted, kind))
    assert_complete(adapted)


@pytest.mark.parametrize("make", [swin, swin_v2])
@pytest.mark.parametrize("kind", [LowRankLinears, Magnitudes])
def test_an_adapter_in_windows_and_mergings(kind: Any, make: Callable[[], nn.Module]) -> None:
    adapted = replaced(make(), ("attn.proj", "mlp.fc1", "reduction"), _with_bias(kind))
    assert_same(adapted, merged(adapted, kind))
    assert_complete(adapted)


def _with_bias(kind: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(base: nn.Linear) -> nn.Module:
        if base.bias is None:
            base.bias = nn.Parameter(torch.zeros(base.out_features))
        return kind(base)

    return make


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_mlp_of_adapters_is_no_adapter(kind: Any) -> None:
    mlp = nn.Sequential(Mlp(8, 32))
    assert [found.name for found in projections(mlp)] == ["0.fc1", "0.fc2"]
    adapted = replaced(mlp, ("fc1", "fc2"), kind)
    assert [(found.name, found.in_features) for found in projections(adapted)] == [("0.fc1", 8), ("0.fc2", 32)]
    one = replaced(mlp, ("fc2",), kind)
    assert [(found.name, found.out_features) for found in projections(one)] == [("0.fc1", 32), ("0.fc2", 8)]


def test_an_adapter_follows_its_weights() -> None:
    """What an adapter was in one call is not remembered in the next."""
    adapted = replaced(vit(), ("attn.proj",), LowRankParameters)
    before = maps(adapted)
    for part in adapted.modules():
        if isinstance(part, LowRankParameters):
            part.B.data.mul_(-2)
    assert not torch.allclose(maps(adapted), before, rtol=1e-2)
    assert_same(adapted, merged(adapted, LowRankParameters), ("lnstat",))


class Bottleneck(nn.Module):
    """An adapter with an activation, which no matrix stands for."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 8), nn.Linear(8, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(F.gelu(self.down(x)))


class OnlyLikeThis(LowRankParameters):
    """An adapter that cannot be run for itself."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two images, please")
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Bottleneck, r"'blocks\.2\.attn\.proj' \(Bottleneck\).*is not affine: off by"),
        (OnlyLikeThis, r"'blocks\.2\.attn\.proj' \(OnlyLikeThis\).*cannot be run for itself.*two images, please"),
    ],
)
def test_what_no_matrix_stands_for_is_refused_by_name(kind: Any, reason: str) -> None:
    model = replaced(vit(), ("2.attn.proj",), kind)
    with untouched(model), pytest.raises(UnsupportedModelError, match=reason):
        maps(model)
    # Where no evidence is led through it, it may be what it is.
    elsewhere = replaced(vit(), ("mlp.fc2",), Bottleneck)
    assert_complete(elsewhere)


# Weights that are made when they are needed -------------------------------------------------------


def _each(model: nn.Module, names: tuple[str, ...], change: Callable[[nn.Module], Any]) -> nn.Module:
    for name, part in list(model.named_modules()):
        if name.endswith(names):
            change(part)
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
)
def test_parametrised_weights(change: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model, plain = _each(vit(), LINEARS, change), vit()
    with torch.no_grad():
        model(images())  # older ones are made in a pass
        parts = dict(model.named_modules())
        _each(plain, LINEARS, lambda part: None)
        for name, part in plain.named_modules():
            if name.endswith(LINEARS):
                part.weight.copy_(parts[name].weight)
    assert_same(model, plain)


def test_compiled_parts() -> None:
    model, plain = vit(), vit()
    for block in model.blocks:
        block.attn.proj = torch.compile(block.attn.proj, backend="eager")
        block.attn = torch.compile(block.attn, backend="eager")
        block.mlp.compile(backend="eager")
    for rule in RULES:
        assert torch.equal(maps(model, rule), maps(plain, rule))


# Integers -----------------------------------------------------------------------------------------


class Int8Weight(nn.Module):
    """A Linear whose weight is held in int8, a scale for every row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("whole", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def merged(self) -> Tensor:
        return self.whole * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)


def test_weights_in_int8() -> None:
    model, plain = replaced(vit(), LINEARS, Int8Weight), vit()
    for (_, part), (name, _) in zip(
        [pair for pair in model.named_modules() if isinstance(pair[1], Int8Weight)],
        [pair for pair in plain.named_modules() if pair[0].endswith(LINEARS)],
        strict=True,
    ):
        plain.get_submodule(name).weight.data = part.merged()
    assert_same(model, plain)


@pytest.fixture
def quantised_engine() -> Any:
    engine = torch.backends.quantized.engine
    engines = [name for name in torch.backends.quantized.supported_engines if name in ("fbgemm", "x86", "qnnpack")]
    if not engines:
        pytest.skip("torch was built without int8 kernels")
    torch.backends.quantized.engine = engines[0]
    yield
    torch.backends.quantized.engine = engine


def _dynamic(names: tuple[str, ...]) -> nn.Module:
    model = vit()
    chosen = {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.endswith(names)}
    return torch.ao.quantization.quantize_dynamic(model, chosen, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_inputs_in_int8(quantised_engine: Any) -> None:
    """Where only the values and the MLP are made of them, the map is that of the model up to their rounding."""
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.attn\.proj' \(Linear\).*rounds what it is given"):
        maps(_dynamic(LINEARS))
    model = _dynamic(("attn.qkv", "mlp.fc1", "mlp.fc2"))
    assert_complete(model)
    assert_same(model, vit(), ("lnstat", "evidence", "rollout"), tolerance=0.1)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.attn\.qkv' .*lets no gradient through"):
        maps(model, "gradient")
    with pytest.raises(RecordingError, match=r"lets no gradient through \(quantised"):
        maps(_dynamic(("head",)))


@pytest.mark.filterwarnings("ignore")
def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    chosen: Any = {"filter_fn": lambda part, name: isinstance(part, nn.Linear) and name.endswith(LINEARS)}
    weights, plain = vit(), vit()
    quantization.quantize_(weights, quantization.Int8WeightOnlyConfig(), **chosen)
    for name, part in plain.named_modules():
        if name.endswith(LINEARS):
            part.weight.data = weights.get_submodule(name).weight.dequantize()
    assert_same(weights, plain)
    both = vit()
    quantization.quantize_(both, quantization.Int8DynamicActivationInt8WeightConfig(), **chosen)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.attn\.proj'.*not affine.*its weight is a Int8Tensor"):
        maps(both)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.attn\.qkv'.*lets no gradient through"):
        maps(both, "gradient")


# Weights that are not where they were -------------------------------------------------------------


class Offloaded:
    """Brings the weights of one module before it runs, and takes them away after it, as accelerate's hooks do."""

    def __init__(self, module: nn.Module) -> None:
        self.held = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
        self.module, self.own = module, module.forward
        self.away()
        module.forward = self.forward  # type: ignore[method-assign]

    def away(self) -> None:
        for name, value in self.held.items():
            self.module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name, value in self.held.items():
            self.module._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            return self.own(*args, **kwargs)
        finally:
            self.away()


def test_offloaded_weights() -> None:
    model = vit()
    for block in model.blocks:
        for part in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.norm1, block.norm2):
            Offloaded(part)
    assert_same(model, vit(), ("lnstat", "evidence", "rollout"))


def test_an_offloaded_scale_is_refused_by_name() -> None:
    model = vit(init_values=0.5)
    Offloaded(model.blocks[1].ls1)
    with pytest.raises(UnsupportedModelError, match=r"LayerScale of 'blocks\.1' is a Parameter on the meta device"):
        maps(model)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_offload() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert_same(accelerate.cpu_offload(vit(), execution_device="cpu"), vit())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.filterwarnings("ignore")
def test_sharded_and_replicated() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        replicated = nn.parallel.DistributedDataParallel(vit())
        assert torch.equal(maps(replicated), maps(vit()))
        model = vit()
        fully_shard(model.blocks[1], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedModelError, match=r"sharded \(FSDP or DTensor, seen at 'blocks\.1'\)"):
            maps(model)
    finally:
        torch.distributed.destroy_process_group()


# peft -----------------------------------------------------------------------------------------------

TIMM = ["qkv", "proj", "fc1", "fc2"]
PEFT: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "LoRA": (vit, "LoraConfig", {"target_modules": TIMM}),
    "LoRA of the head": (vit, "LoraConfig", {"target_modules": [*TIMM, "head"]}),
    "LoRA with modules to save": (vit, "LoraConfig", {"target_modules": TIMM, "modules_to_save": ["head", "norm1"]}),
    "DoRA": (vit, "LoraConfig", {"target_modules": ["attn.proj", "qkv"], "use_dora": True}),
    "rsLoRA": (distilled, "LoraConfig", {"target_modules": TIMM, "use_rslora": True}),
    "IA3": (vit, "IA3Config", {"target_modules": ["attn.proj", "fc2"], "feedforward_modules": ["fc2"]}),
    "LoHa": (vit, "LoHaConfig", {"target_modules": ["attn.proj"]}),
    "OFT": (vit, "OFTConfig", {"target_modules": ["attn.proj"], "oft_block_size": 4}),
    "LoRA of a Swin": (swin, "LoraConfig", {"target_modules": [*TIMM, "reduction"]}),
    "DoRA of a Swin v2": (swin_v2, "LoraConfig", {"target_modules": ["attn.proj", "reduction"], "use_dora": True}),
    "LoRA of a Hiera": (hiera, "LoraConfig", {"target_modules": "all-linear"}),
    "LoRA of a Hugging Face ViT": (hf_vit, "LoraConfig", {"target_modules": "all-linear"}),
    "DoRA of a Hugging Face Swin": (hf_swin, "LoraConfig", {"target_modules": "all-linear", "use_dora": True}),
    "LoRA of a torchvision ViT": (torchvision_vit, "LoraConfig", {"target_modules": ["mlp.0", "mlp.3"]}),
    "LoRA of its attention": (torchvision_vit, "LoraConfig", {"target_modules": ["self_attention"]}),
}


def with_peft(name: str) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make, kind, options = PEFT[name]
    if "LoraConfig" in kind or "LoHa" in kind:
        options = {"r": 4, **options}
    model = peft.get_peft_model(make(), getattr(peft, kind)(**options))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the adapters, which do nothing as they are made
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT)
def test_peft_is_the_merged_model(name: str) -> None:
    adapted = with_peft(name)
    merged_in_place = copy.deepcopy(adapted)
    merged_in_place.merge_adapter()
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert_same(adapted, plain, tolerance=2e-5)
    assert_same(merged_in_place, plain, ("lnstat", "evidence"), tolerance=2e-5)
    assert_complete(adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "names"), [(torchvision_swin, ["proj"]), (torchvision_vit, ["out_proj"])], ids=["swin", "vit"]
)
def test_peft_around_a_weight_that_is_taken_and_not_run(make: Callable[[], nn.Module], names: list[str]) -> None:
    """torchvision takes the weights of these Linears: peft's adapters around them are not part of the model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    assert torch.allclose(adapted(images()), make()(images()), atol=1e-5)
    for rule in ("lnstat", "evidence"):
        assert torch.allclose(maps(adapted, rule), maps(make(), rule), atol=1e-6)
