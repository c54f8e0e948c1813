"""Small encoders with RMSNorms, of ``torch``, of timm, of Hugging Face, and of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from helpers.own_models import Encoder
from helpers.plain_models import CLASSES, WIDTH, Headed, Plain, transformers


class OwnRMSNorm(nn.Module):
    """As language models write it; its weight is stored less one."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.g, self.eps = nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.g)


def _with_rms(norm: type[nn.Module], **options: Any) -> Encoder:
    """An encoder of torch with RMSNorms in the place of its LayerNorms."""
    model = Encoder("class", batch_first=True, final=True, **options)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, norm(WIDTH))
    return model


_SIZES: dict[str, Any] = {
    "img_size": (32, 48), "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": CLASSES,
}  # fmt: skip
_AIM: dict[str, Any] = {
    "class_token": False, "fc_norm": False, "global_pool": "avg", "qkv_bias": False, "proj_bias": False,
    "act_layer": "silu", "norm_layer": partial(RmsNorm, eps=1e-5), "embed_norm_layer": partial(RmsNorm, eps=1e-5),
    "mlp_layer": SwiGLU,
}  # fmt: skip


def _hugging_face(kernel: str) -> nn.Module:
    config = transformers.Aimv2VisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=32,
        patch_size=8, use_head=False, attn_implementation=kernel,
    )  # fmt: skip
    return Headed(transformers.Aimv2VisionModel(config), lambda output: output.last_hidden_state.mean(1))


def _case(name: str, make: Any, prefix: int = 1, image: tuple[int, int] = (32, 48)) -> Plain:
    pooling = "class token" if prefix else ("mean of the patches" if "timm" in name else "mean of the tokens")
    return Plain(f"rms-{name}", make, image, (image[0] // 8, image[1] // 8), (8, 8), prefix, pooling)


RMS = [
    _case("timm-aimv2", partial(VisionTransformer, **_SIZES, **_AIM), 0),
    _case("timm-torch", partial(VisionTransformer, **_SIZES, norm_layer=nn.RMSNorm)),
    _case("timm-scale-norm", partial(VisionTransformer, **_SIZES, norm_layer=RmsNorm, scale_attn_norm=True)),
    _case("pre-norm", partial(_with_rms, nn.RMSNorm, norm_first=True)),
    _case("post-norm", partial(_with_rms, nn.RMSNorm)),
    _case("own", partial(_with_rms, OwnRMSNorm, norm_first=True)),
]
if transformers is not None and hasattr(transformers, "Aimv2VisionModel"):
    RMS += [_case(f"hf-{kernel}", partial(_hugging_face, kernel), 0, (32, 32)) for kernel in ("sdpa", "eager")]
