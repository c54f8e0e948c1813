"""Small models of the hierarchical families, with the classes of the libraries that define them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from timm.models.efficientvit_msra import EfficientVitMsra
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit, model_cfgs
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.tiny_vit import TinyVit
from timm.models.twins import Twins
from torch import Tensor, nn
from torchvision.models import MaxVit

CLASSES = 5
WIDTHS, HEADS, DEPTHS = (16, 32, 48), (1, 2, 3), (1, 2, 2)

Size = tuple[int, int]


def seeded(kind: Any, *args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(*args, **options)
    return model.eval()


def maxxvit(
    name: str,
    size: Size = (64, 64),
    widths: tuple[int, ...] = (32, 32, 48, 64),
    kind: type[nn.Module] = MaxxVit,
    **attention: Any,
) -> Any:
    """A named configuration made small: one block a stage, as many stages as widths."""
    stages = len(widths)
    config = model_cfgs[name]
    config = dataclasses.replace(
        config,
        embed_dim=widths,
        depths=(1, 1, 1, 1)[:stages],
        block_type=config.block_type[:stages],
        stem_width=widths[0] if isinstance(config.stem_width, int) else (16, widths[0]),
        head_hidden_size=64 if config.head_hidden_size else None,
        transformer_cfg=dataclasses.replace(config.transformer_cfg, dim_head=16, **attention),
    )
    return seeded(kind, config, img_size=size, num_classes=CLASSES)


def maxvit_torchvision(size: Size = (64, 64), kind: type[nn.Module] = MaxVit) -> Any:
    return seeded(
        kind,
        input_size=size,
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 32],
        block_layers=[1, 2, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def pvt_v2(kind: type[nn.Module] = PyramidVisionTransformerV2, **options: Any) -> Any:
    options = {"embed_dims": WIDTHS, "num_heads": HEADS, "depths": DEPTHS, "sr_ratios": (4, 2, 1), **options}
    return seeded(kind, mlp_ratios=(2, 2, 2), num_classes=CLASSES, **options)


def twins(kind: type[nn.Module] = Twins, **options: Any) -> Any:
    options = {"embed_dims": WIDTHS, "num_heads": HEADS, "depths": (2, 1, 2), "sr_ratios": (4, 2, 1), **options}
    return seeded(kind, mlp_ratios=(2, 2, 2), num_classes=CLASSES, **{"img_size": 64, **options})


def tiny_vit(kind: type[nn.Module] = TinyVit, **options: Any) -> Any:
    options = {"embed_dims": WIDTHS, "num_heads": HEADS, "depths": DEPTHS, "window_sizes": (3, 3, 4), **options}
    return seeded(kind, num_classes=CLASSES, **options)


def nest(kind: type[nn.Module] = Nest, **options: Any) -> Any:
    options = {"embed_dims": WIDTHS, "num_heads": HEADS, "depths": (2, 1, 2), "mlp_ratio": 2.0, **options}
    return seeded(kind, num_classes=CLASSES, **{"img_size": 64, **options})


def hiera(kind: type[nn.Module] = Hiera, **options: Any) -> Any:
    options = {
        "embed_dim": 16,
        "stages": (1, 2, 2),
        "mask_unit_size": (4, 4),
        "q_pool": 2,
        "head_init_scale": 1.0,
        **options,
    }
    return seeded(kind, num_classes=CLASSES, **{"img_size": (64, 64), **options})


def efficientvit(kind: type[nn.Module] = EfficientVitMsra, **options: Any) -> Any:
    options = {"key_dim": (4, 4, 4), "depth": (1, 2, 1), "num_heads": (2, 2, 2), "window_size": (3, 3, 3), **options}
    return seeded(kind, embed_dim=WIDTHS, num_classes=CLASSES, **{"img_size": 128, **options})


def mvit_v2(kind: type[nn.Module] = MultiScaleVit, size: Size = (64, 64), **options: Any) -> Any:
    config = MultiScaleVitCfg(
        depths=DEPTHS,
        embed_dim=WIDTHS,
        num_heads=HEADS,
        mlp_ratio=2.0,
        stride_q=((1, 1), (2, 2), (2, 2)),
        stride_kv=None,
        **options,
    )
    return seeded(kind, config, img_size=size, num_classes=CLASSES)


def _pyramid(size: Size) -> dict[str, Any]:
    return {
        "image_size": max(size),
        "depths": list(DEPTHS),
        "hidden_sizes": list(WIDTHS),
        "num_attention_heads": list(HEADS),
        "mlp_ratios": [2, 2, 2],
        "num_encoder_blocks": 3,
        "num_labels": CLASSES,
    }


def pvt_hf(size: Size = (64, 64)) -> Any:
    config = transformers.PvtConfig(**_pyramid(size), sequence_reduction_ratios=[4, 2, 1])
    return seeded(transformers.PvtForImageClassification, config)


def pvt_v2_hf(size: Size = (64, 64), **options: Any) -> Any:
    config = transformers.PvtV2Config(**_pyramid(size), sr_ratios=[4, 2, 1], **options)
    return seeded(transformers.PvtV2ForImageClassification, config)


def hiera_hf(size: Size = (64, 64)) -> Any:
    config = transformers.HieraConfig(
        image_size=list(size),
        embed_dim=16,
        num_heads=[1, 2, 4],
        depths=[1, 2, 2],
        masked_unit_size=[4, 4],
        num_query_pool=2,
        num_labels=CLASSES,
    )
    return seeded(transformers.HieraForImageClassification, config)


PARTS = {"window_size": (2, 2), "grid_size": (2, 2)}
WIDE = (32, 64, 128)  # a depthwise convolution from one width to the next
# Model, image, grid of the first attention block, pooling.
MODELS: dict[str, tuple[Callable[[Size], Any], Size, Size, str]] = {
    "maxvit_tiny_rw": (lambda s: maxxvit("maxvit_tiny_rw", s, (32, 32, 48), **PARTS), (64, 96), (16, 24), "tokens"),
    "maxvit_tiny_tf": (lambda s: maxxvit("maxvit_tiny_tf", s, (32, 32, 48), **PARTS), (64, 96), (16, 24), "tokens"),
    "maxvit_rmlp": (lambda s: maxxvit("maxvit_rmlp_pico_rw", s, (32, 48), **PARTS), (64, 96), (16, 24), "tokens"),
    "maxvit_as_many_channels_as_rows": (
        lambda s: maxxvit("maxvit_tiny_rw", s, (16, 32), **PARTS),
        (64, 64),
        (16, 16),
        "tokens",
    ),
    "maxxvit": (lambda s: maxxvit("maxxvit_rmlp_nano_rw", s, WIDE, **PARTS), (64, 96), (16, 24), "tokens"),
    "maxxvit_v2": (lambda s: maxxvit("maxxvitv2_nano_rw", s, WIDE, **PARTS), (64, 96), (16, 24), "tokens"),
    "coatnet_rw": (lambda s: maxxvit("coatnet_nano_rw", s), (64, 96), (8, 12), "tokens"),
    "coatnet": (lambda s: maxxvit("coatnet_0", s), (64, 96), (8, 12), "tokens"),
    "coatnet_rmlp": (lambda s: maxxvit("coatnet_rmlp_nano_rw", s), (64, 96), (8, 12), "tokens"),
    "coatnext": (lambda s: maxxvit("coatnext_nano_rw", s), (64, 96), (8, 12), "tokens"),
    "maxvit_torchvision": (maxvit_torchvision, (64, 64), (16, 16), "tokens"),
    "pvt_v2": (lambda s: pvt_v2(), (64, 96), (16, 24), "tokens"),
    "pvt_v2_odd": (lambda s: pvt_v2(sr_ratios=(3, 2, 1)), (70, 90), (18, 23), "tokens"),
    "pvt_v2_li": (lambda s: pvt_v2(linear=True), (64, 96), (16, 24), "tokens"),
    "twins_svt": (lambda s: twins(wss=(3, 3, 3)), (64, 96), (16, 24), "tokens"),
    "twins_pcpvt": (lambda s: twins(wss=None), (64, 96), (16, 24), "tokens"),
    "nest": (lambda s: nest(), (64, 64), (16, 16), "tokens"),
    "tiny_vit": (lambda s: tiny_vit(), (64, 96), (8, 12), "tokens"),
    "tiny_vit_odd": (lambda s: tiny_vit(), (72, 104), (9, 13), "tokens"),
    "hiera": (lambda s: hiera(img_size=s), (64, 96), (16, 24), "tokens"),
    "hiera_two_pools": (
        lambda s: hiera(img_size=s, stages=(1, 2, 1, 1), q_pool=2, mask_unit_size=(8, 8)),
        (64, 96),
        (16, 24),
        "tokens",
    ),
    "hiera_abswin": (
        lambda s: hiera(
            img_size=s, abs_win_pos_embed=True, init_values=0.3, use_expand_proj=False, global_pos_size=(4, 4)
        ),
        (64, 96),
        (16, 24),
        "tokens",
    ),
    "mvit_v2": (lambda s: mvit_v2(), (64, 64), (16, 16), "tokens"),
    "mvit_v2_cls": (lambda s: mvit_v2(use_cls_token=True), (64, 64), (16, 16), "class token"),
    "mvit_v2_plain_queries": (lambda s: mvit_v2(residual_pooling=False), (64, 64), (16, 16), "tokens"),
    "pvt_hf": (pvt_hf, (64, 64), (16, 16), "class token"),
    "pvt_v2_hf": (pvt_v2_hf, (64, 96), (16, 24), "tokens"),
    "pvt_v2_li_hf": (lambda s: pvt_v2_hf(s, linear_attention=True), (64, 96), (16, 24), "tokens"),
    "hiera_hf": (hiera_hf, (64, 64), (16, 16), "tokens"),
}


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With BatchNorms that have seen images: else convolutions let the stream grow until attention adds nothing to it.

    In a CoAtNet as it is made here the variance of a token is 1e8 and that of an attention's update 20.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.eval()
    return model
