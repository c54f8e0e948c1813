"""Names that the commands take, written down so that help and mistakes are answered before torch is there."""

from __future__ import annotations

from pathlib import Path
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
# What ``evaluate`` has besides, and its data.
BLIND = ("random", "centre")
METRICS = (
    *("pointing", "energy", "iou", "ap", "f1", "accuracy", "positive", "negative", "insertion", "deletion", "corners"),
    *("two", "grid", "randomisation", "segmentation", "box", "maxbox", "saco", "spearman", "infidelity", "sensitivity"),
)
DATA = ("scenes", "imagenet", "tiny-imagenet", "imagenet-segmentation", "voc", "coco", "folder", "human")
# What names of timm's and torchvision's transformers begin with.
FAMILIES = (
    *("vit", "deit", "deit3", "swin", "swinv2", "beit", "beitv2", "eva", "eva02", "cait", "flexivit", "naflexvit"),
    *("gcvit", "samvit", "maxvit", "maxxvit", "maxxvitv2", "coatnet", "pvt", "twins", "nest", "mvitv2", "hiera"),
    *("tiny", "efficientvit"),
)
# The models and scenes that come with the package, and what they tell apart.
ZOO = ("swin-mini", "vit-mini")
SCENES = 400
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "bag", "ankle boot")
# Endings that matplotlib writes, and forms of raw maps.
FIGURES = frozenset(
    ("eps", "jpeg", "jpg", "pdf", "pgf", "png", "ps", "raw", "rgba", "svg", "svgz", "tif", "tiff", "webp")
)
# In the place of a file: standard input, standard output.
STREAM = Path("-")
MAPS = ("npy", "npz", "safetensors", "png")
