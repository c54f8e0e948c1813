"""Captum's argument types; Captum itself ships none that a type checker can see."""

from __future__ import annotations

from typing import Any, TypeVar, Union

from torch import Tensor

Target = Union[None, int, tuple[int, ...], Tensor, list[int], list[tuple[int, ...]]]
ForwardArgs = Any
TensorOrTuple = TypeVar("TensorOrTuple", Tensor, tuple[Tensor, ...])
