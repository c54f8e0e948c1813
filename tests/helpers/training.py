"""A small model, and Lightning's trainer on it for some epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, drop_rate=0.3, proj_drop_rate=0.2
    )


def lightning() -> Any:
    return pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed: pip install 'captum-lnstat[training]'"
    )


def trained(folder: Path, *callbacks: Any, logger: Any = False, epochs: int = 2, **options: Any) -> Any:
    """The module after some epochs, the same for every call."""
    pl = lightning()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.frozen = nn.Dropout().eval()

        def forward(self, images):
            return self.net(images)

        def training_step(self, batch, _):
            images, labels = batch
            return nn.functional.cross_entropy(self(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(2)
    data = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 3)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        log_every_n_steps=1, **options,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    return module
