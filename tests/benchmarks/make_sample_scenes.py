"""Draw the sample scenes that ship with the package: ``captum_lnstat/zoo/scenes.npz``.

Needs what ``train_reference_models.py`` needs. The seed is one that neither training nor the accuracy figure uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from reference_scenes import SceneSource

SEED = 91_000
SINGLE, DOUBLE = 240, 160


def main() -> None:
    source = SceneSource("test", SEED)
    single, double = source.single(SINGLE), source.double(DOUBLE)
    images = torch.cat([single.images, double.images])
    labels = torch.cat([torch.nn.functional.pad(single.labels, (0, 1), value=-1), double.labels])
    masks = torch.cat([torch.nn.functional.pad(single.masks, (0, 0, 0, 0, 0, 1)), double.masks])
    target = Path(__file__).parents[2] / "captum_lnstat" / "zoo" / "scenes.npz"
    np.savez_compressed(
        target,
        images=(images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(),
        labels=labels.to(torch.int8).numpy(),
        masks=np.packbits(masks.flatten(2).numpy(), axis=-1),
    )
    print(f"{len(images)} scenes, {target.stat().st_size / 1e6:.1f} MB -> {target.name}")


if __name__ == "__main__":
    main()
