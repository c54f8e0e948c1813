"""The models of the matrix: real classes of timm, torchvision and transformers, small, with random weights.

A row's builder is called in the process that examines it, so that a library that is absent costs only its own rows.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: As it is known in its library.
        library: Where it comes from.
        build: Makes the small model.
        size: Height and width of the images it is examined on.
        others: Further sizes to try: larger, non-square, not a multiple of the patch or window.
        default: Makes the model as its name gives it, and the size of its images.
        refused: The model is one that has to be refused.
        output: Which of several outputs is explained.
        margin: A stimulus may be found so many pixels beside it, where convolutions make tokens of more than a patch.
        stimulus: Height and width of the stimulus; as large as a token of the last block by default.
        step: Regions lie at multiples of so many pixels; of the stimulus by default.
        steps: Steps of training at most.
        seeds: Times a model is trained and its peaks are counted, with other textures and scenes each time.
        note: Why an exception is one, in words.
        elsewhere: Makes the small model for the other sizes, if it has to be told that it will be given some.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    size: Size
    others: tuple[Size, ...] = ()
    default: tuple[Callable[[], nn.Module], Size] | None = None
    refused: bool = False
    output: Any = None
    margin: int = 0
    stimulus: Size | None = None
    step: Size | None = None
    steps: int = 250
    seeds: int = 1
    note: str = ""
    elsewhere: Callable[[], nn.Module] | None = None


def _timm(name: str, **options: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, num_classes=10, **options)


def _timm_default(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name)


def _class(module: str, name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"timm.models.{module}"), name)(**options)


def _maxxvit(name: str, size: Size, widths: tuple[int, ...], **attention: Any) -> nn.Module:
    """A named configuration with one block a stage and as many stages as widths, which have to grow."""
    maxxvit = importlib.import_module("timm.models.maxxvit")
    config = maxxvit.model_cfgs[name]
    config = replace(
        config,
        embed_dim=widths,
        depths=(1,) * len(widths),
        block_type=config.block_type[: len(widths)],
        stem_width=widths[0] if isinstance(config.stem_width, int) else (16, widths[0]),
        head_hidden_size=64 if config.head_hidden_size else None,
        transformer_cfg=replace(config.transformer_cfg, dim_head=16, **attention),
    )
    return maxxvit.MaxxVit(config, img_size=size, num_classes=10)


def maxxvit_row(name: str, config: str, size: Size, widths: tuple[int, ...], native: int, **attention: Any) -> Row:
    default = partial(_timm_default, name), (native, native)
    return Row(name, "timm", partial(_maxxvit, config, size, widths, **attention), size, default=default)


def _mvit() -> nn.Module:
    mvit = importlib.import_module("timm.models.mvitv2")
    config = mvit.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=16, num_heads=1)
    return mvit.MultiScaleVit(config, img_size=128, num_classes=10)


VIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "window_size": 4}


def timm_row(
    name: str, size: Size, native: int | Size = 224, others: tuple[Size, ...] = (), *, refused: bool = False, **o: Any
) -> Row:
    native = (native, native) if isinstance(native, int) else native
    default = None if refused else (partial(_timm_default, name), native)
    return Row(name, "timm", partial(_timm, name, **o), size, others, default, refused)


def vit_row(name: str, patch: int = 16, native: int | Size = 224, **options: Any) -> Row:
    """A plain model of two narrow blocks on 4 x 6 patches."""
    size = (4 * patch, 6 * patch)
    row = timm_row(name, size, native, img_size=size, **{**VIT, **options})
    others = (6 * patch, 6 * patch), (3 * patch, 3 * patch), (6 * patch, 4 * patch), (4 * patch + 6, 6 * patch + 5)
    return replace(row, others=others, elsewhere=partial(_any_size, row.build))


def _any_size(build: Callable[..., nn.Module]) -> nn.Module:
    """A model of timm that is told to take any size, as far as its class knows how to."""
    told: tuple[dict[str, bool], ...] = (
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"dynamic_img_size": True},
        {"strict_img_size": False},
    )
    for options in told:
        try:
            return build(**options)
        except (TypeError, AssertionError):  # not an option of this class
            continue
    return build()


def _torchvision(name: str, **options: Any) -> nn.Module:
    if name.startswith("vit"):
        vit = importlib.import_module("torchvision.models.vision_transformer")
        small = {"patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 96}
        return vit.VisionTransformer(**{**small, **options})
    if name.startswith("maxvit"):
        return importlib.import_module("torchvision.models.maxvit").MaxVit(**options)
    swin = importlib.import_module("torchvision.models.swin_transformer")
    extra = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if "v2" in name else {}
    return swin.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=[4, 4], num_classes=10,
        **extra, **options,
    )  # fmt: skip


def torchvision_row(name: str, size: Size, others: tuple[Size, ...] = (), native: int = 224, **options: Any) -> Row:
    def whole() -> nn.Module:
        return importlib.import_module("torchvision.models").get_model(name, weights=None)

    return Row(name, "torchvision", partial(_torchvision, name, **options), size, others, (whole, (native, native)))


class Interpolated(nn.Module):
    """A model of transformers that is told to interpolate its position embedding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images, interpolate_pos_encoding=True).logits


class Head(nn.Module):
    """A user's classifier on what a bare vision tower pools."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, 10)
        self.options: dict[str, bool] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(pixel_values=images, **self.options).pooler_output)


def _hf(config: str, attention: str, tower: str | None = None, model: str | None = None, **options: Any) -> nn.Module:
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, config)(**options)
    made._attn_implementation = attention
    if tower is not None:
        return Head(getattr(transformers, tower)(made), made.hidden_size)
    if model is not None:
        return getattr(transformers, model)(made)
    made.num_labels = 10
    return transformers.AutoModelForImageClassification.from_config(made)


def _interpolated(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, told to interpolate its position embedding if it can be told so."""
    model = build()
    asked = inspect.signature(getattr(model, "tower", model).forward).parameters
    if "interpolate_pos_encoding" not in asked:
        return model
    if isinstance(model, Head):
        model.options = {"interpolate_pos_encoding": True}
        return model
    return Interpolated(model)


HF_VIT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
HF_SWIN = {"image_size": 64, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 4}


def hf_rows(
    name: str, config: str, small: dict[str, Any], size: Size, others: tuple[Size, ...] = (), **kind: Any
) -> list[Row]:
    """One row for each implementation of attention."""
    rows = []
    for attention in ("sdpa", "eager"):
        default = partial(_hf, config, attention, **kind)
        made = partial(_hf, config, attention, **kind, **small)
        row = Row(f"{name} ({attention})", "transformers", made, size, others, (default, (224, 224)))
        # A Swin takes what it is given; the others have a position embedding of one size.
        rows.append(row if "swin" in name.lower() else replace(row, elsewhere=partial(_interpolated, made)))
    return rows


def _scripted() -> nn.Module:
    return torch.jit.trace(_timm("vit_tiny_patch16_224", img_size=64, **VIT).eval(), torch.rand(1, 3, 64, 64))


def any_size(row: Row) -> Row:
    return replace(row, elsewhere=partial(_any_size, row.build))


PYRAMID = {"depths": (1, 2, 2), "num_heads": (1, 2, 3), "embed_dims": (16, 32, 48)}
TWINS = {**PYRAMID, "depths": (2, 1, 2), "sr_ratios": (4, 2, 1), "mlp_ratios": (2, 2, 2)}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 2), "mask_unit_size": (4, 4), "q_pool": 2}
PARTS = {"window_size": (2, 2), "grid_size": (2, 2)}
HF_PVT = {
    "image_size": 64,
    "hidden_sizes": [16, 32, 48],
    "depths": [1, 2, 2],
    "num_attention_heads": [1, 2, 3],
    "mlp_ratios": [2, 2, 2],
    "num_encoder_blocks": 3,
}
HF_HIERA = {
    "image_size": [64, 64],
    "embed_dim": 16,
    "depths": [1, 2, 2],
    "num_heads": [1, 2, 4],
    "masked_unit_size": [4, 4],
    "num_query_pool": 2,
}
TV_MAXVIT = {
    "input_size": (64, 64),
    "stem_channels": 16,
    "partition_size": 2,
    "block_channels": [16, 32, 32],
    "block_layers": [1, 2, 1],
    "head_dim": 8,
    "stochastic_depth_prob": 0.0,
    "num_classes": 10,
}
WIDE, SQUARE, ODD = (64, 96), (64, 64), (72, 100)
HF_OTHERS = ((64, 96), (96, 96), (48, 48))
SIZES = ((96, 96), (32, 64), ODD)
STAGES4 = {"embed_dims": (16, 32, 32, 48), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 2, 1)}

STEM = (
    "attention cannot see through the ResNet that makes the tokens, and each of them reads far more than its patch: "
    "what a token beside the stimulus saw of it is counted at that token"
)
BELOW = (
    "attention cannot see through the convolutions between its stages: below the last of them evidence is shared "
    "evenly by the tokens under a token, and those read beyond their patch"
)

FIFTEEN: list[Row] = [
    vit_row("vit_tiny_patch16_224"),
    Row(
        "vit_tiny_patch16_224, 224 x 320",
        "timm",
        partial(_timm, "vit_tiny_patch16_224", img_size=(64, 112), **VIT),
        (64, 112),
        default=(
            lambda: importlib.import_module("timm").create_model("vit_tiny_patch16_224", img_size=(224, 320)),
            (224, 320),
        ),
    ),
    vit_row("deit_tiny_distilled_patch16_224"),
    vit_row("vit_small_patch14_reg4_dinov2", 14, 518),
    any_size(timm_row("swin_tiny_patch4_window7_224", WIDE, others=SIZES, img_size=WIDE, **SWIN)),
    replace(any_size(timm_row("swinv2_tiny_window8_256", WIDE, 256, SIZES, img_size=WIDE, **SWIN)), seeds=6),
    replace(
        maxxvit_row("maxvit_tiny_tf_224", "maxvit_tiny_tf", WIDE, (32, 32, 48), 224, **PARTS), margin=4, others=SIZES
    ),
    replace(timm_row("pvt_v2_b0", (128, 160), others=((160, 160), (140, 172), (64, 96)), **STAGES4), margin=4),
    vit_row("eva02_tiny_patch14_224", 14),
    replace(timm_row("hiera_tiny_224", WIDE, others=SIZES, img_size=WIDE, head_init_scale=1.0, **HIERA), margin=4),
    vit_row("vit_base_patch16_siglip_224"),
    torchvision_row("vit_b_16", SQUARE, HF_OTHERS, image_size=64),
    torchvision_row("swin_t", WIDE, SIZES),
    *hf_rows("ViT", "ViTConfig", HF_VIT, SQUARE, HF_OTHERS)[:1],
    *hf_rows("Swin", "SwinConfig", HF_SWIN, SQUARE, (*HF_OTHERS[:2], ODD))[:1],
]

ONWARD: list[Row] = [
    vit_row("deit_tiny_patch16_224"),
    vit_row("deit3_small_patch16_224"),
    vit_row("beit_base_patch16_224"),
    vit_row("beitv2_base_patch16_224"),
    vit_row("eva02_base_patch14_448", 14, 448),
    vit_row("flexivit_small", 16, 240),
    vit_row("vit_small_patch14_dinov2", 14, 518),
    vit_row("vit_small_patch16_dinov3", 16, 256),
    vit_row("vit_base_patch16_siglip_gap_224"),
    vit_row("vit_base_patch16_reg4_gap_256", 16, 256),
    vit_row("vit_base_patch16_rope_224"),
    vit_row("vit_base_patch16_rope_mixed_224"),
    vit_row("vit_base_patch16_clip_224"),
    vit_row("vit_base_patch16_rpn_224"),
    vit_row("vit_relpos_small_patch16_224"),
    vit_row("vit_srelpos_small_patch16_224"),
    Row("vit_tiny_patch16_224, qk_norm", "timm",
        partial(_timm, "vit_tiny_patch16_224", img_size=(64, 96), qk_norm=True, **VIT), (64, 96)),
    Row("vit_tiny_patch16_224, fc_norm", "timm",
        partial(_timm, "vit_tiny_patch16_224", img_size=(64, 96), global_pool="avg", fc_norm=True, **VIT), (64, 96)),
    Row("vit_tiny_patch16_224, dynamic size", "timm",
        partial(_timm, "vit_tiny_patch16_224", img_size=(64, 96), dynamic_img_size=True, dynamic_img_pad=True, **VIT),
        (64, 96), ((128, 96), (70, 101), (48, 48))),
    replace(vit_row("vit_small_r26_s32_224", 32), margin=8, note=STEM),
    replace(vit_row("vit_small_resnet26d_224", 32), margin=8),
    timm_row("naflexvit_base_patch16_gap", (64, 96), 384, ((96, 96), (128, 64)), **VIT),
    vit_row("samvit_base_patch16_224", window_size=4, global_attn_indexes=(1,)),
    vit_row("cait_xxs24_224"),
    any_size(timm_row("swin_s3_tiny_224", WIDE, others=SIZES, img_size=WIDE, **{**SWIN, "window_size": (4, 4, 2)})),
    replace(any_size(timm_row("swinv2_cr_tiny_ns_224", WIDE, others=SIZES, img_size=WIDE, **SWIN)), seeds=3),
    Row("swin_tiny_patch4_window7_224, any size", "timm",
        partial(_timm, "swin_tiny_patch4_window7_224", img_size=WIDE, strict_img_size=False, **SWIN), WIDE,
        ((96, 96), ODD, (32, 64))),
    replace(timm_row("twins_pcpvt_small", WIDE, others=SIZES, img_size=WIDE, **TWINS), margin=4),
    replace(timm_row("twins_svt_small", WIDE, others=SIZES, img_size=WIDE, wss=(3, 3, 3), **TWINS), margin=4),
    Row("nest_tiny", "timm", partial(_class, "nest", "Nest", img_size=64, **{**PYRAMID, "depths": (2, 1, 2)},
        mlp_ratio=2.0, num_classes=10), SQUARE, default=(partial(_timm_default, "nest_tiny"), (224, 224)),
        margin=8, stimulus=(32, 32), step=(16, 16), others=SIZES),
    Row("gcvit_xxtiny", "timm", partial(_class, "gcvit", "GlobalContextVit", img_size=(96, 128),
        embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 2), num_classes=10), (96, 128),
        default=(partial(_timm_default, "gcvit_xxtiny"), (224, 224)), margin=4,
        others=((128, 128), (96, 96), (100, 132))),
    Row("mvitv2_tiny", "timm", _mvit, (128, 128),
        default=(partial(_timm_default, "mvitv2_tiny"), (224, 224)), margin=4,
        others=((160, 160), (96, 128), (132, 164))),
    Row("maxvit_tiny_tf_224, two stages", "timm",
        partial(_timm, "maxvit_tiny_tf_224", embed_dim=(32, 64), depths=(1, 1), img_size=224), (224, 224)),
    replace(maxxvit_row("maxxvit_rmlp_nano_rw_256", "maxxvit_rmlp_nano_rw", WIDE, (32, 64, 128), 256, **PARTS),
        margin=4, steps=800, others=SIZES),
    replace(maxxvit_row("coatnet_0_rw_224", "coatnet_0_rw", (128, 160), (32, 32, 48, 64), 224), margin=8,
        others=((160, 160), (96, 96))),
    replace(timm_row("tiny_vit_5m_224", WIDE, others=SIZES, window_sizes=(3, 3, 4), **PYRAMID), margin=8, note=BELOW),
    replace(timm_row("efficientvit_m0", (224, 224), others=((256, 256), (192, 224))), margin=8, note=BELOW),
    replace(timm_row("pvt_v2_b2_li", (128, 160), others=((160, 160), (140, 172), (64, 96)), **STAGES4), margin=4),
    torchvision_row("swin_v2_t", WIDE, SIZES, 256),
    torchvision_row("vit_b_32", (128, 128), image_size=128, patch_size=32),
    torchvision_row("vit_l_16", (96, 96), image_size=96),
    replace(torchvision_row("maxvit_t", SQUARE, HF_OTHERS, **TV_MAXVIT), margin=4, steps=800),
    *hf_rows("ViT", "ViTConfig", HF_VIT, SQUARE, HF_OTHERS)[1:],
    *hf_rows("Swin", "SwinConfig", HF_SWIN, SQUARE, (*HF_OTHERS[:2], ODD))[1:],
    *hf_rows("SwinV2", "Swinv2Config", HF_SWIN, SQUARE, (*HF_OTHERS[:2], ODD))[1:],
    *hf_rows("DeiT", "DeiTConfig", HF_VIT, SQUARE, HF_OTHERS, model="DeiTForImageClassification"),
    *hf_rows("DeiT with teacher", "DeiTConfig", HF_VIT, SQUARE, HF_OTHERS,
        model="DeiTForImageClassificationWithTeacher"),
    *hf_rows("DINOv2", "Dinov2Config", HF_VIT, SQUARE, HF_OTHERS),
    *hf_rows("DINOv2 with registers", "Dinov2WithRegistersConfig", HF_VIT, SQUARE, HF_OTHERS),
    *hf_rows("DINOv3 ViT, own head", "DINOv3ViTConfig", HF_VIT, SQUARE, HF_OTHERS, tower="DINOv3ViTModel"),
    *hf_rows("BEiT", "BeitConfig", HF_VIT, SQUARE, HF_OTHERS),
    *hf_rows("CLIP vision tower, own head", "CLIPVisionConfig", HF_VIT, SQUARE, HF_OTHERS, tower="CLIPVisionModel"),
    *hf_rows("SigLIP vision tower, own head", "SiglipVisionConfig", HF_VIT, SQUARE, HF_OTHERS,
        tower="SiglipVisionModel"),
    *(
        replace(row, margin=4)
        for row in (
            *hf_rows("PVT", "PvtConfig", {**HF_PVT, "sequence_reduction_ratios": [4, 2, 1]}, SQUARE, HF_OTHERS)[1:],
            *hf_rows("PVTv2", "PvtV2Config", {**HF_PVT, "sr_ratios": [4, 2, 1]}, WIDE, SIZES)[1:],
            *hf_rows("Hiera", "HieraConfig", HF_HIERA, SQUARE, HF_OTHERS)[1:],
        )
    ),
]  # fmt: skip

REFUSED: list[Row] = [
    timm_row("resnet50", SQUARE, refused=True),
    timm_row("convnext_atto", SQUARE, refused=True),
    timm_row("poolformer_s12", SQUARE, refused=True),
    timm_row("mixer_s16_224", (224, 224), refused=True),
    timm_row("xcit_nano_12_p16_224", (224, 224), refused=True),
    timm_row("levit_128s", (224, 224), refused=True),
    Row("vit_tiny_patch16_224, scripted", "timm", _scripted, SQUARE, refused=True),
]

ROWS: list[Row] = [*FIFTEEN, *ONWARD, *REFUSED]
