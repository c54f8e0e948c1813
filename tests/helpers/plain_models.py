"""Small plain encoders of timm, torchvision and Hugging Face, and what a reader of their configuration knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchvision
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig

from helpers.contract import lively
from helpers.models import generator

try:
    import transformers
except ImportError:  # the models of Hugging Face are left out, with a reason, by what uses this
    transformers = None  # type: ignore[assignment]

CLASSES = 5
WIDTH = 24


class Headed(nn.Module):
    """A user's head on a bare vision model of Hugging Face."""

    def __init__(self, trunk: nn.Module, read: Callable[[Any], Tensor], keywords: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.trunk, self.read, self.keywords = trunk, read, keywords or {}
        self.score = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.read(self.trunk(x, **self.keywords)))
        return scores


class Own(nn.Module):
    """A user's ViT on ``nn.TransformerEncoder``, as tutorials write it."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, 8, 8)
        self.place = nn.Parameter(torch.zeros(1, 24, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 32, batch_first=True, norm_first=norm_first, activation="gelu")
        self.mix = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.say = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.say(self.mix(self.cut(x).flatten(2).mT + self.place).mean(1))
        return scores


@dataclass(frozen=True)
class Plain:
    """A model to build and what is known of it.

    Attributes:
        name: Test id.
        make: Builds it.
        image: Height and width of the images it is shown.
        grid: Its patch tokens.
        patch: Pixels of a patch.
        prefix: Its prefix tokens.
        pooling: How its head is described.
        start: The weights with which its head reads the tokens, prefix first; ``None`` for attention pooling.
    """

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    image: tuple[int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    pooling: str

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return lively(self.make(), seed).to(dtype).eval()

    def images(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, 3, *self.image, generator=generator(7)).to(dtype)

    @property
    def start(self) -> Tensor | None:
        prefix, patches = self.prefix, self.grid[0] * self.grid[1]
        class_token = torch.eye(prefix + patches, dtype=torch.float64)[0]
        spread = torch.ones(prefix + patches, dtype=torch.float64)
        spread[:prefix] = 0
        spread = spread / patches
        starts: dict[str, Tensor | None] = {
            "class token": class_token,
            "class and distillation token": torch.eye(prefix + patches, dtype=torch.float64)[:2].mean(0),
            "mean of the patches": spread,
            "mean of the tokens": torch.full_like(spread, 1 / len(spread)),
            "class token and mean of the patches": (class_token + spread) / 2,
            "attention pooling": None,
        }
        return starts[self.pooling]


def _timm(name: str, kind: Callable[..., nn.Module], pooling: str, prefix: int = 1, **options: Any) -> Plain:
    extra = {key: options.pop(key) for key in ("image", "grid", "patch") if key in options}
    size = {
        "img_size": (32, 48),
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 3,
        "num_classes": CLASSES,
    }
    options = {**size, **options}
    image = extra.get("image", options["img_size"])
    patch = extra.get("patch", (options["patch_size"],) * 2)
    grid = extra.get("grid", (image[0] // patch[0], image[1] // patch[1]))
    return Plain(f"timm-{name}", partial(kind, **options), image, grid, patch, prefix, pooling)


def _naflex(**options: Any) -> NaFlexVit:
    sizes = {name: options.pop(name) for name in ("img_size", "num_classes")}
    return NaFlexVit(NaFlexVitCfg(**options), **sizes)


def _hybrid(**options: Any) -> VisionTransformer:
    backbone = ResNetV2(
        (1, 1), channels=(128, 128), stem_chs=32, num_classes=0, global_pool="", preact=False, stem_type="same",
        conv_layer=StdConv2dSame,
    )  # fmt: skip
    return VisionTransformer(embed_layer=partial(HybridEmbed, backbone=backbone), **{**options, "patch_size": 1})


_SAM = {"patch_size": 4, "window_size": 3, "global_attn_indexes": (1,)}
TIMM = [
    _timm("beit", Beit, "mean of the patches", init_values=0.5, use_rel_pos_bias=True, use_abs_pos_emb=False),
    _timm("beit-shared", Beit, "class token", init_values=0.5, use_shared_rel_pos_bias=True, global_pool="token"),
    _timm(
        "eva02", Eva, "mean of the patches", swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False,
        use_rot_pos_emb=True, init_values=0.5,
    ),
    _timm("eva02-fused", Eva, "class token", use_rot_pos_emb=True, swiglu_mlp=True, global_pool="token"),
    _timm(
        "dinov3", Eva, "mean of the patches", 5, init_values=0.5, use_rot_pos_emb=True, use_abs_pos_emb=False,
        num_reg_tokens=4, rope_type="dinov3", attn_type="rope", global_pool="avg",
    ),
    _timm("deit3", VisionTransformer, "class token", init_values=0.5, no_embed_class=True),
    _timm("reg4", VisionTransformer, "class token", 5, init_values=0.5, reg_tokens=4, no_embed_class=True),
    _timm("fc-norm", VisionTransformer, "mean of the patches", global_pool="avg", fc_norm=True),
    _timm("qk-norm", VisionTransformer, "class token", qk_norm=True),
    _timm("map", VisionTransformer, "attention pooling", 0, class_token=False, global_pool="map"),
    _timm(
        "odd-sizes", VisionTransformer, "class token", image=(36, 45), grid=(5, 6), dynamic_img_size=True,
        dynamic_img_pad=True,
    ),
    _timm("hybrid", _hybrid, "class token", patch=(8, 8), num_heads=2),
    _timm(
        "hybrid-odd-sizes", _hybrid, "class token", image=(39, 50), grid=(5, 7), patch=(8, 8), num_heads=2,
        dynamic_img_size=True,
    ),
    _timm("naflex", _naflex, "mean of the patches", 0, global_pool="avg", fc_norm=True, init_values=0.5),
    _timm("naflex-class", _naflex, "class token", 3, class_token=True, reg_tokens=2, global_pool="token"),
    _timm("map-of-all", Eva, "attention pooling", use_rot_pos_emb=True, global_pool="map", attn_pool_num_heads=3),
    _timm("naflex-map", _naflex, "attention pooling", 0, global_pool="map"),
    _timm(
        "sam", VisionTransformerSAM, "mean of the tokens", 0, **_SAM, img_size=(32, 40), neck_chans=16,
        use_rel_pos=True, init_values=0.5,
    ),
    _timm("sam-no-neck", VisionTransformerSAM, "mean of the tokens", 0, **_SAM, img_size=(32, 40), neck_chans=0),
    _timm(
        "sam-mlp-head", VisionTransformerSAM, "mean of the tokens", 0, **_SAM, img_size=(32, 40), neck_chans=0,
        head_hidden_size=16, qk_norm=True,
    ),
]  # fmt: skip


def _torchvision(name: str, **options: Any) -> Plain:
    make = partial(
        torchvision.models.VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=3,
        hidden_dim=WIDTH, mlp_dim=32, num_classes=CLASSES, **options,
    )  # fmt: skip
    return Plain(f"torchvision-{name}", make, (32, 32), (4, 4), (8, 8), 1, "class token")


TORCHVISION = [
    _torchvision("vit"),
    _torchvision(
        "vit-stem", conv_stem_configs=[ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2), ConvStemConfig(16, 3, 2)]
    ),
    Plain("own", Own, (32, 48), (4, 6), (8, 8), 0, "mean of the tokens"),
]


def _hugging_face(name: str, pooling: str, prefix: int, make: Callable[..., nn.Module], **options: Any) -> list[Plain]:
    """One case under fused attention, and one under explicit attention."""
    image = options.pop("image", (32, 32))
    cases = []
    for kernel in ("sdpa", "eager"):
        built = partial(make, **options, attn_implementation=kernel)
        grid = image[0] // 8, image[1] // 8
        cases.append(Plain(f"hf-{name}-{kernel}", built, image, grid, (8, 8), prefix, pooling))
    return cases


_SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def _made(config: str, model: str, **options: Any) -> nn.Module:
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**_SIZES, **options}))
    return made


def _classifier(config: str, model: str, **options: Any) -> nn.Module:
    return _made(config, model, num_labels=CLASSES, **options)


def _headed(config: str, model: str, read: Callable[[Any], Tensor], **options: Any) -> nn.Module:
    keywords = options.pop("keywords", None)
    return Headed(_made(config, model, **options), read, keywords)


def _towers(config: str, model: str, **options: Any) -> nn.Module:
    text = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    text |= {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    both = getattr(transformers, config)(vision_config=dict(_SIZES), text_config=text, num_labels=CLASSES, **options)
    made: nn.Module = getattr(transformers, model)(both)
    return made


def pooled(output: Any) -> Any:
    return output.pooler_output


def _mean_of_patches(output: Any) -> Any:
    return output.last_hidden_state[:, 5:].mean(1)


_class, _mean, _all = "class token", "mean of the patches", "mean of the tokens"
_Classes, _Heads = partial(partial, _classifier), partial(partial, _headed)
HUGGING_FACE = (
    [
        *_hugging_face(
            "vit", _class, 1, _Classes("ViTConfig", "ViTForImageClassification"), image_size=(32, 48), image=(32, 48)
        ),
        *_hugging_face(
            "vit-bare",
            _class,
            1,
            _Heads("ViTConfig", "ViTModel", pooled),
            keywords={"interpolate_pos_encoding": True},
            image=(40, 52),
        ),
        *_hugging_face("deit", _class, 2, _Classes("DeiTConfig", "DeiTForImageClassification")),
        *_hugging_face(
            "deit-distilled",
            "class and distillation token",
            2,
            _Classes("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
        ),
        *_hugging_face(
            "dinov2",
            "class token and mean of the patches",
            1,
            _Classes("Dinov2Config", "Dinov2ForImageClassification"),
            layerscale_value=0.5,
            image=(40, 52),
        ),
        *_hugging_face("dinov2-bare", _class, 1, _Heads("Dinov2Config", "Dinov2Model", pooled), use_swiglu_ffn=True),
        *_hugging_face(
            "dinov2-registers",
            "class token and mean of the patches",
            5,
            _Classes("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"),
        ),
        *_hugging_face(
            "dinov3",
            _class,
            5,
            _Heads("DINOv3ViTConfig", "DINOv3ViTModel", pooled),
            num_register_tokens=4,
            image=(32, 51),
        ),
        *_hugging_face(
            "dinov3-mean",
            _mean,
            5,
            _Heads("DINOv3ViTConfig", "DINOv3ViTModel", _mean_of_patches),
            num_register_tokens=4,
            use_gated_mlp=True,
        ),
        *_hugging_face(
            "beit", _mean, 1, _Classes("BeitConfig", "BeitForImageClassification"), use_relative_position_bias=True
        ),
        *_hugging_face(
            "beit-shared",
            _class,
            1,
            _Classes("BeitConfig", "BeitForImageClassification"),
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
            layer_scale_init_value=0.0,
        ),
        *_hugging_face(
            "clip",
            _class,
            1,
            _Heads("CLIPVisionConfig", "CLIPVisionModel", pooled),
            keywords={"interpolate_pos_encoding": True},
            image=(40, 48),
        ),
        *_hugging_face("clip-classes", _mean, 1, partial(_towers, "CLIPConfig", "CLIPForImageClassification")),
        *_hugging_face("siglip", "attention pooling", 0, _Heads("SiglipVisionConfig", "SiglipVisionModel", pooled)),
        *_hugging_face("siglip-classes", _all, 0, partial(_towers, "SiglipConfig", "SiglipForImageClassification")),
    ]
    if transformers is not None
    else []
)

CASES = {case.name: case for case in [*TIMM, *TORCHVISION, *HUGGING_FACE]}
