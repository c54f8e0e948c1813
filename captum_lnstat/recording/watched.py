"""What a recorder looks at, and what it does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.recording.freezing import LAYER_NORMS, SOFTMAXES
from captum_lnstat.recording.joins import CONCATENATIONS
from captum_lnstat.recording.rms import RMS_NORMS

WATCHED = {
    *LAYER_NORMS,
    *CONCATENATIONS,
    *SOFTMAXES,
    Tensor.repeat,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    *RMS_NORMS,
    torch.einsum,
}
# What is refused to a tensor with a graph while gradients are on.
TO_NUMPY: set[Any] = {Tensor.numpy, Tensor.__array__}
# Modules in which neither attention nor a norm runs: which of them is running need not be known.
LEAVES = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
}
