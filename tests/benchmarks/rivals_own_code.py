"""Maps of the baselines beside those of other packages' code: same DeiT-Tiny, same photographs, value by value.

    pip install --target FOLDER --no-deps grad-cam ttach opencv-python-headless torchcam txv
    PYTHONPATH=FOLDER python tests/benchmarks/rivals_own_code.py

writes the table of ``docs/rivals.md`` that is between its marks. A package that is not there is left out, and said to
be. Each package gets the model in the form that it knows: timm's, torchvision's, or its own, with the same weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from real_data import FOLDER, Photographs, check_folder, photographs, real_model
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from captum_lnstat import AttentionRollout, BeyondIntuition, GenericAttention, LeGrad
from captum_lnstat.attribution.gradcam import GradCam, HiResCAM

PAGE = Path(__file__).parents[2] / "docs" / "rivals.md"
MARKS = "<!-- own code -->", "<!-- end of own code -->"
SIDE = 14
LAYER = "blocks.11.norm1"
BAR = "\\|"
# From an image and a class to a map, both float32: (row, column).
Map = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Row:
    """A method that another package has, too.

    Attributes:
        method: Its name in ``compare``.
        package: On the package index.
        ours: This package's map.
        theirs: From timm's DeiT to the other package's.
        note: What differs in how it is made.
    """

    method: str
    package: str
    ours: Callable[[nn.Module], Map]
    theirs: Callable[[nn.Module], Map]
    note: str


# The model in other forms.


def as_torchvision(deit: nn.Module) -> nn.Module:
    """The same weights in torchvision's ViT."""
    vit = VisionTransformer(224, 16, 12, 3, 192, 768)
    names = {"attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj", "norm1": "ln_1",
             "norm2": "ln_2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}  # fmt: skip
    whole = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
             "norm": "encoder.ln", "head": "heads.head"}  # fmt: skip
    found = {}
    for name, value in deit.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            for old, new in names.items():
                rest = rest.replace(old, new)
            found[f"encoder.layers.encoder_layer_{number}.{rest}"] = value
        else:
            found[f"{whole[stem]}.{kind}" if stem else whole[name]] = value
    vit.load_state_dict(found)
    return vit.eval()


def as_txv(deit: nn.Module) -> Any:
    """The same weights in txv's own ViT, with timm's epsilon."""
    from txv.models import VisionTransformer as Other

    norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
    vit = Other(embed_dim=192, num_heads=3, qkv_bias=True, norm_layer=norm)
    vit.load_state_dict(deit.state_dict())
    return vit.eval()


# Maps of others.


def gradcam(kind: str) -> Callable[[nn.Module], Map]:
    """pytorch-grad-cam's, before it scales each map to 0 .. 1."""

    def make(deit: nn.Module) -> Map:
        import pytorch_grad_cam as package
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        layers = [deit.get_submodule(LAYER)]
        cam = getattr(package, kind)(deit, layers, reshape_transform=tokens_first)

        def found(image: Tensor, target: int) -> Tensor:
            targets = [ClassifierOutputTarget(target)]
            cam(input_tensor=image[None].clone().requires_grad_(), targets=targets)
            seen = cam.activations_and_grads
            inputs = (seen.activations[-1].detach().numpy(), seen.gradients[-1].detach().numpy())
            raw = cam.get_cam_image(image[None], layers[0], targets, *inputs, False)
            return large(torch.from_numpy(np.maximum(raw, 0))[0])

        return found

    return make


def torchcam_gradcam(deit: nn.Module) -> Map:
    """torchcam's, not normalised."""
    from torchcam.methods import GradCAM

    cam = GradCAM(deit, LAYER, reshape_transform=tokens_first)

    def found(image: Tensor, target: int) -> Tensor:
        scores = deit(image[None].clone().requires_grad_())
        return large(cam(target, scores, normalized=False)[0][0].detach())

    return found


def torchcam_legrad(deit: nn.Module) -> Map:
    """torchcam's, of all blocks, not normalised, on torchvision's form of the model."""
    from torchcam.methods import LeGrad as Other

    vit = as_torchvision(deit)
    cam = Other(vit, list(vit.encoder.layers))  # type: ignore[union-attr]

    def found(image: Tensor, target: int) -> Tensor:
        scores = vit(image[None].clone().requires_grad_())
        return cam(target, scores, normalized=False)[0][0].detach()

    return found


def txv(kind: str, needs_class: bool = True, **options: Any) -> Callable[[nn.Module], Map]:
    """txv's, on its own form of the model."""

    def make(deit: nn.Module) -> Map:
        import txv.exp as package

        method = getattr(package, kind)(as_txv(deit))

        def found(image: Tensor, target: int) -> Tensor:
            asked = {**options, **({"index": target} if needs_class else {})}
            return method.explain(image[None].clone(), **asked).detach().reshape(SIDE, SIDE)

        return found

    return make


def of_its_maps(weigh: Callable[[Tensor, Tensor], Tensor], steps: int = 0) -> Callable[[nn.Module], Map]:
    """``prod (1 + weigh(A, dA))`` of the attention that txv's model keeps, times the feedback of ``steps`` passes."""

    def make(deit: nn.Module) -> Map:
        vit = as_txv(deit)
        for block in vit.blocks:
            block.attn.save_att = True

        def gone(image: Tensor, target: int) -> list[tuple[Tensor, Tensor]]:
            vit(image[None])[0, target].backward()
            return [(block.attn.get_attn()[0].detach(), block.attn.get_attgradients()[0]) for block in vit.blocks]

        def found(image: Tensor, target: int) -> Tensor:
            product = torch.eye(SIDE * SIDE + 1)
            for attention, gradient in gone(image, target):
                product = product + weigh(attention, gradient) @ product
            feedback = sum(gone(image * k / steps, target)[-1][1] / steps for k in range(1, steps + 1))
            if isinstance(feedback, Tensor):
                product = product * feedback.clamp(min=0).mean(0)
            return product[0, 1:].reshape(SIDE, SIDE)

        return found

    return make


def positive_parts(attention: Tensor, gradient: Tensor) -> Tensor:
    """``E_h (A dA)^+``."""
    return (attention * gradient).clamp(min=0).mean(0)


def by_importance(attention: Tensor, gradient: Tensor) -> Tensor:
    """Heads by ``|sum_ij A dA|``."""
    importance = (attention * gradient).sum((1, 2)).abs()
    return torch.einsum("h,hij->ij", importance / importance.sum(), attention)


# Maps of this package.


def ours(kind: Any, **options: Any) -> Callable[[nn.Module], Map]:
    """On the patch grid."""

    def make(deit: nn.Module) -> Map:
        method = kind(deit, **options)
        return lambda image, target: method.relevance(image[None], target=target)[0]

    return make


def our_cam(kind: Any) -> Callable[[nn.Module], Map]:
    """At the size of the image."""
    return lambda deit: lambda image, target: kind(deit, deit, LAYER).attribute(image[None], target)[0, 0]


def tokens_first(tokens: Tensor) -> Tensor:
    """Patch tokens as ``(batch, channel, row, column)``."""
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, SIDE, SIDE)


def large(grid: Tensor) -> Tensor:
    """A grid at the size of the image, as this package enlarges it."""
    return F.interpolate(grid[None, None], (224, 224), mode="bilinear", align_corners=False)[0, 0]


RAW = "before it is scaled to 0 .. 1"
SCALED = "scales the feedback to 0 .. 1"
BI, CHEFER = ours(BeyondIntuition), ours(GenericAttention)
HEADS = ours(BeyondIntuition, approximation="head")
ROWS = (
    Row("gradcam", "grad-cam", our_cam(GradCam), gradcam("GradCAM"), RAW),
    Row("gradcam", "torchcam", our_cam(GradCam), torchcam_gradcam, RAW),
    Row("hirescam", "grad-cam", our_cam(HiResCAM), gradcam("HiResCAM"), RAW),
    Row("legrad", "torchcam", ours(LeGrad), torchcam_legrad, RAW + "; on torchvision's ViT"),
    Row("attention-rollout", "txv", ours(AttentionRollout), txv("AttentionRollout", False), "the same"),
    Row("chefer", "txv", CHEFER, txv("GenericAttention"), "(E A dA)^+ in place of E (A dA)^+ over the heads"),
    Row("chefer", "txv", CHEFER, of_its_maps(positive_parts), "its model's maps, by the paper's formula"),
    Row("beyond-intuition", "txv", BI, txv("BeyondIntuition", method="token"), SCALED),
    Row("beyond-intuition-heads", "txv", HEADS, txv("BeyondIntuition", method="head"),
        SCALED + "; heads by the mean of |A^T dA|, a matrix, in place of |sum A dA|"),
    Row("beyond-intuition-heads", "txv", HEADS, of_its_maps(by_importance, 20),
        "its model's maps, heads by |sum A dA|"),
)  # fmt: skip


def compared(row: Row, deit: nn.Module, taken: Photographs) -> tuple[float, float, float]:
    """The largest difference in parts of the largest value, the same after the best scale, the least correlation."""
    mine, other = row.ours(deit), row.theirs(deit)
    found = []
    for image, target in zip(taken.images, taken.targets.tolist(), strict=True):
        a, b = (make(image, target).double().detach().flatten() for make in (mine, other))
        scale = (a @ b) / (a @ a)
        largest = b.abs().max()
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        found.append([float((a - b).abs().max() / largest), float((scale * a - b).abs().max() / largest),
                      float(correlation)])  # fmt: skip
    differences, scaled, correlations = zip(*found, strict=True)
    return max(differences), max(scaled), min(correlations)


def lines(deit: nn.Module, taken: Photographs) -> Iterator[str]:
    """The table, a row a method and package."""
    yield "| method | package | what is its own there | difference | at the best scale | correlation |"
    yield "|---|---|---|---|---|---|"
    for row in ROWS:
        try:
            version = importlib.metadata.version(row.package)
            difference, scaled, correlation = compared(row, deit, taken)
        except ImportError as error:
            print(f"{row.package}: {error}; left out", file=sys.stderr)
            continue
        numbers = f"{difference:.1e} | {scaled:.1e} | {correlation:.6f}"
        yield f"| {row.method} | {row.package} {version} | {row.note.replace('|', BAR)} | {numbers} |"
        print(row.method, row.package, difference, scaled, correlation, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=FOLDER, help="photographs and weights; %(default)s")
    parser.add_argument("--photographs", type=int, default=10)
    parser.add_argument("--page", type=Path, default=PAGE, help="%(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_folder(options.real)
    subject = real_model(options.real, "DeiT-Tiny")
    subject.model.requires_grad_(True)  # which grad-cam and txv need
    taken = photographs(options.real, subject, options.photographs, odd=True)
    table = "\n".join(lines(subject.model, taken))
    before, _, rest = options.page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    text = f"Worst of {len(taken.images)} photographs, true class."
    options.page.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
