"""A callback of Lightning's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from operator import attrgetter
from typing import Any

from captum_lnstat.explanation.explain import explain
from captum_lnstat.explanation.explainer import Target
from captum_lnstat.explanation.explanation import Explanation
from captum_lnstat.explanation.subject.images import ImageLike
from captum_lnstat.recording.modes import in_eval_mode
from captum_lnstat.training.maps import log_maps, takes_images

# One process would wait for ever for the parts of the weights that others have.
_SHARDING = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}


def _callback() -> type:
    """The class of callbacks, under either name of the library; without it there is no trainer to take one."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ModuleNotFoundError):
            found: type = import_module(name).Callback
            return found
    return object


class MapCallback(_callback()):  # type: ignore[misc]
    """Explains the same images after every so many epochs, and writes the maps to the trainer's loggers.

    The model is explained in eval mode, and trained as if it had not been: modes, gradients and random numbers are
    those of before. Of several processes the first one explains; strategies that shard weights are refused.

    Args:
        images: As for ``explain``: inputs as a floating tensor, or images with the ``transform`` that makes inputs of
            them.
        target: As for ``explain``: the class of each, or one for all; by default the predicted one.
        every: Epochs from one explanation to the next.
        part: Name of the attribute that is the model, as ``"net"`` or ``"net.vit"``; by default the LightningModule,
            whose ``forward`` then gives the scores.
        tag: As for ``log_maps``.
        **options: As for ``explain``: ``rule``, ``transform``, ``class_names``, ...

    Raises:
        ValueError: ``every`` is less than 1; when training begins, the trainer has no logger that takes images, or
            shards weights over processes.

    Example:
        >>> import torch
        >>> callback = MapCallback(torch.rand(4, 3, 224, 224), target=[0, 3, 3, 1], every=5, part="net")
        >>> callback.every, callback.tag
        (5, 'lnstat')
    """

    def __init__(
        self,
        images: ImageLike | Sequence[ImageLike],
        target: Target | Sequence[Target] = None,
        *,
        every: int = 1,
        part: str | None = None,
        tag: str = "lnstat",
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every!r}; expected a number of epochs, 1 or more")
        self.images, self.target, self.every, self.part, self.tag = images, target, every, part, tag
        self.options = options

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not any(_takes_images(logger) for logger in trainer.loggers):
            given = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise ValueError(
                f"the trainer has no logger that takes images, but {given}; expected TensorBoardLogger or WandbLogger"
            )

        strategy = type(trainer.strategy)
        if {each.__name__ for each in strategy.__mro__} & _SHARDING:
            raise ValueError(
                f"{strategy.__name__} shards weights over processes, and one process alone cannot run the model; "
                "expected DDPStrategy, or one device"
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.current_epoch + 1) % self.every or not trainer.is_global_zero:
            return
        model = attrgetter(self.part)(pl_module) if self.part else pl_module
        with in_eval_mode(model):
            found = explain(model, self.images, self.target, **self.options)  # type: ignore[arg-type]
        each = [found] if isinstance(found, Explanation) else list(found)
        for logger in filter(_takes_images, trainer.loggers):
            _write(logger, each, self.tag, trainer.global_step)


def _takes_images(logger: Any) -> bool:
    return hasattr(logger, "log_image") or takes_images(logger.experiment)


def _write(logger: Any, found: list[Explanation], tag: str, step: int) -> None:
    if hasattr(logger, "log_image"):  # W&B's: Lightning counts its steps in a way of its own
        logger.log_image(key=tag, images=[each.overlay for each in found], step=step, caption=list(map(str, found)))
    else:
        log_maps(logger.experiment, found, tag=tag, step=step)
