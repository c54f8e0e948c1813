"""Names that the commands take, written down so that help and mistakes are answered before torch is there."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["sheet", "overlay", "original", "layers", "heads", "classes"]
ScaleOf = Literal["method", "map", "shared"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALES: tuple[ScaleOf, ...] = get_args(ScaleOf)
RULES = ("lnstat", "evidence", "rollout", "gradient")
METHODS = (
    *("lnstat", "lnstat-contrastive", "evidence", "rollout", "gradient", "chefer", "attention-rollout"),
    *("raw-attention", "frozen-layernorm", "libragrad", "libragrad-attcat", "libragrad-tokens", "vitcx", "rise"),
    *("gradcam", "hirescam", "legrad", "agcam", "attcat", "beyond-intuition", "beyond-intuition-heads"),
    *("ig", "inputxgradient", "saliency", "occlusion"),
)
# The models that come with the package, and what they tell apart.
ZOO = ("swin-mini", "vit-mini")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "bag", "ankle boot")
# Endings that matplotlib writes, and forms of raw maps.
FIGURES = frozenset(
    ("eps", "jpeg", "jpg", "pdf", "pgf", "png", "ps", "raw", "rgba", "svg", "svgz", "tif", "tiff", "webp")
)
MAPS = ("npy", "npz", "safetensors", "png")
