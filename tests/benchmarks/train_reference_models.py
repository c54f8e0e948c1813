"""Train the two reference models that ship with the package, from scratch, on one CPU core (about 45 minutes each).

Install the photographs and the items first::

    apt-get install dataset-fashion-mnist
    pip install --no-deps mvtb-data==1.6.1 scikit-image==0.26.0

then, for the shipped weights::

    python tests/benchmarks/train_reference_models.py swin-mini --seed 0
    python tests/benchmarks/train_reference_models.py vit-mini --seed 0

The weights go to ``captum_lnstat/zoo/weights/NAME.safetensors`` (fp16); another seed is a file for comparison and
goes where ``--output`` says. The run is seeded; the last digits depend on the torch build and the thread count.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from reference_scenes import SceneSource
from safetensors.torch import save_file
from torch import nn

from captum_lnstat.zoo import architecture

BATCH = 64  # small: at this size the number of steps, not of images, is what the accuracy waits for
STEPS = {"swin-mini": 9000, "vit-mini": 6000}
CURRICULUM = 0.35  # share of the steps with larger items on darker ground; without it the models start much later
TEST_SEED = 90_000  # training seeds stay below; the scenes in the package are drawn with 91_000


def normalise(images: torch.Tensor) -> torch.Tensor:
    return images * 2 - 1  # mean 0.5, std 0.5: what the shipped transform does


@torch.no_grad()
def accuracy(model: nn.Module, scenes: int = 5000) -> float:
    """Top-1 accuracy on single-object scenes of the test split."""
    source = SceneSource("test", TEST_SEED)
    model.eval()
    right = 0
    for _ in range(scenes // 250):
        batch = source.single(250)
        right += int((model(normalise(batch.images)).argmax(1) == batch.labels[:, 0]).sum())
    return right / (scenes // 250 * 250)


def train(name: str, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = architecture(name).train()
    source = SceneSource("train", seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        ease = max(0.0, 1 - step / (CURRICULUM * steps))
        batch = source.single(BATCH, ease=ease)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(normalise(batch.images)).float(), batch.labels[:, 0])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 199:
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.3f} {time.time() - start:.0f} s", file=sys.stderr)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the shipped model's number")
    parser.add_argument("--output", type=Path, help="default: the package's weights folder")
    arguments = parser.parse_args()

    model = train(arguments.name, arguments.seed, arguments.steps or STEPS[arguments.name])
    # Round to what is stored before measuring: the figure is that of the file.
    model.half().float()
    package = Path(__file__).parents[2] / "captum_lnstat" / "zoo" / "weights"
    output = arguments.output or package / f"{arguments.name}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, output, metadata={"model": arguments.name, "seed": str(arguments.seed)})
    output.chmod(0o644)  # save_file makes it readable by its owner only, and a wheel would keep that
    print(f"{arguments.name} seed {arguments.seed}: {accuracy(model):.4f} on 5000 held-out scenes -> {output}")


if __name__ == "__main__":
    main()
