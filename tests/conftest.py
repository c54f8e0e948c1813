"""What no test may leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _modes_stay() -> Iterator[None]:
    """Explaining gives back the grad mode, the inference mode, the default dtype and the random state it found."""
    torch.manual_seed(0)
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32
