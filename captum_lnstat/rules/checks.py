"""What is refused before, during and after a recorded pass, so that no picture is made from what does not add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError, warn_caller
from captum_lnstat.recording.eager import named, names_and_modules
from captum_lnstat.recording.statistics import stream
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.topology.anatomy.projections import without_gradient
from captum_lnstat.trace.pooling import FixedPooling
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Bool

# How far evidence may be from the score, relative to its size. Float error is far below; another wiring far above.
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
# What a module drops, by the names that torch, timm, torchvision and Hugging Face have for it; ``p`` in these alone.
_DROPPING = ("StochasticDepth", "FeatureAlphaDropout")
_SHARES = {
    True: ("p",),
    False: ("drop_prob", "dropout", "dropout_p", "dropout_prob", "attention_dropout", "attn_dropout"),
}


def check_image(image: object) -> Tensor:
    """The image batch, or an error that says what is wrong with it."""
    if not isinstance(image, Tensor):
        raise TypeError(f"inputs is a {type(image).__name__}; expected a torch.Tensor or a tuple with one")
    if image.layout is not torch.strided or image.is_nested or image.device.type == "meta":
        kind = "nested" if image.is_nested else image.device.type if image.device.type == "meta" else image.layout
        raise TypeError(f"inputs is a {kind} tensor; expected a dense one with values")
    if image.dim() not in (4, 5):
        raise ValueError(
            f"inputs has shape {tuple(image.shape)}; expected (batch, channels, height, width), of videos one axis more"
        )
    if image.numel() == 0:
        raise ValueError(f"inputs has shape {tuple(image.shape)}; expected at least one image")
    if not image.is_floating_point():
        raise TypeError(f"inputs is of {image.dtype}; expected a floating-point image, normalised for the model")
    return image


def check_numbers(image: Tensor) -> Tensor:
    """The image batch, if its numbers are finite."""
    # One look at the images: a NaN is its own minimum and maximum. Of what is not finite the difference is NaN.
    least, most = torch.aminmax(image)
    expect(
        least - least == most - most,
        lambda: ValueError(
            "inputs holds NaN or infinite values; expected finite ones, since no map can be right for it"
        ),
    )
    return image


def check_fits(attribution: Tensor) -> Tensor:
    """Relevance that is finite may still be too large for the narrow dtype of the images."""
    if attribution.dtype.itemsize < 4:
        expect(
            torch.isfinite(attribution),
            lambda: RecordingError(
                f"the relevance does not fit into {attribution.dtype}, the dtype of the images; expected images in "
                "float32 for a score of this size"
            ),
        )
    return attribution


def size_not_taken(embed: Any, size: tuple[int, int]) -> str | None:
    """Why a patch embedding does not take images of a size, or ``None``: it does, or does not say."""
    own, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if not isinstance(own, tuple | list) or not isinstance(patch, tuple | list):
        return None
    if getattr(embed, "strict_img_size", True):
        return f"the model takes {tuple(own)} only" if size != tuple(own) else None
    if not getattr(embed, "dynamic_img_pad", False) and (size[0] % patch[0] or size[1] % patch[1]):
        return f"the model takes multiples of its patch size {tuple(patch)} only"
    return None


def check_axes(image: Tensor, axes: int, model: Any) -> None:
    """Images for a model of images, videos for one of videos, of as many frames as it says it takes."""
    expected = "(batch, channels, height, width)"
    if image.dim() == 5:
        expected += (
            ": the convolution that cuts the patches is one of images, so where in a video they lie is not known"
        )
    if axes == 3:
        expected = "videos, (batch, channels, frames, height, width) or with the frames first, as the model takes them"
    if image.dim() != axes + 2:
        raise ValueError(f"inputs has shape {tuple(image.shape)}; expected {expected}")
    frames = getattr(getattr(model, "config", None), "num_frames", None)
    if axes == 3 and isinstance(frames, int) and frames not in image.shape[1:3]:
        raise ValueError(f"inputs has shape {tuple(image.shape)}; the model takes videos of {frames} frames")


def check_size(image: Tensor, model: nn.Module, entrance: str, *, direct: bool) -> None:
    """Images that the model cannot take, refused before it runs.

    Args:
        image: The images.
        model: The transformer.
        entrance: Name of its patch embedding.
        direct: The images are given to the transformer as they are, so that their channels are its own.
    """
    embed = named(model).get(entrance) if entrance else None
    # A function around the model may crop or resize them first.
    reason = size_not_taken(embed, (image.shape[-2], image.shape[-1])) if direct else None
    if reason is not None:
        raise ValueError(
            f"inputs are {image.shape[-2]} x {image.shape[-1]} pixels; {reason}. Resize them before you explain them, "
            "or build the model for this size (img_size=, or dynamic_img_size=True where timm has it)"
        )
    layers = () if embed is None else embed.modules()
    convolution = next((layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Conv3d)), None)
    # Of a video, which axis has the channels is the model's own business.
    if direct and convolution is not None and convolution.in_channels not in image.shape[1:-2]:
        seen = f"have {image.shape[1]} channels" if image.dim() == 4 else f"are videos of shape {tuple(image.shape)}"
        raise ValueError(
            f"inputs {seen}; the model takes {convolution.in_channels} channels. Repeat or convert them, or build the "
            "model with in_chans="
        )


def check_seen(seen: Tensor, image: Tensor) -> None:
    """The transformer has to see the images it is to explain: as many, and of their size."""
    video = image.dim() == 5 and seen.dim() == 5
    if len(seen) != len(image) or seen.shape[-2:] != image.shape[-2:] or (video and seen.numel() != image.numel()):
        raise RecordingError(
            f"the transformer was given images of shape {tuple(seen.shape)}, forward_func of {tuple(image.shape)}; "
            f"expected as many, of the same height and width{' and number of frames' * video}. Resize, crop or repeat "
            "them before you explain them"
        )


def check_model(model: nn.Module) -> None:
    """A model that no gradient can be taken of is refused; one in train mode is warned about."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_inference():
        raise RecordingError(
            f"the parameters of {type(model).__name__} were made under torch.inference_mode, so no gradient can be "
            "taken even at its head; build or load the model outside inference_mode"
        )
    drawing = draws_at_random(model)
    if drawing is not None:
        where = f", in {drawing!r} at least" if drawing and not model.training else ""
        warn_caller(
            f"{type(model).__name__} is in train mode{where}: dropout and stochastic depth make the explanation of "
            "this pass random. Call model.eval() first"
        )


def draws_at_random(model: nn.Module) -> str | None:
    """The name of a module in train mode by which a pass is random; ``""`` if all of the model is in that mode.

    A part may be: dropout is switched on for itself to see how sure a model is. That a Linear is, as one that has taken
    the place of a head, changes nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
        >>> draws_at_random(model), draws_at_random(model.requires_grad_(True).train())
        (None, '')
        >>> _ = model.eval()[1].train()
        >>> draws_at_random(model)
        '1'
    """
    if model.training:
        return ""
    return next((name for name, part in names_and_modules(model) if part.training and _draws(part)), None)


def _draws(part: nn.Module) -> bool:
    """Whether a module in train mode drops something, with a probability of more than zero."""
    drops = isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__ in _DROPPING
    return any(isinstance(share := getattr(part, name, 0), int | float) and share > 0 for name in _SHARES[drops])


def check_gradients(model: nn.Module) -> None:
    """A model with a layer that lets no gradient through is refused: what lies behind it would be left out, unseen."""
    closed = without_gradient(model)
    if closed is not None:
        raise UnsupportedModelError(
            f"{closed} lets no gradient through, and this method is made of gradients; expected layers that are not "
            "quantised, or only their weights. rule='lnstat' and rule='evidence' need gradients of the head alone"
        )


def check_whole(model: nn.Module) -> None:
    """A model of which a process holds parts of the weights only is refused."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return  # nothing can be sharded
    from torch.distributed import fsdp
    from torch.distributed.tensor import DTensor

    kinds = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    for name, module in model.named_modules():
        if isinstance(module, kinds) or any(isinstance(p, DTensor) for p in module._parameters.values()):
            raise UnsupportedModelError(
                f"the weights of {type(model).__name__} are sharded (FSDP or DTensor, seen at {name!r}): they are "
                "whole only while a module runs, and an explanation reads them afterwards. Load the full state dict "
                "into a model that is not sharded, and explain that"
            )


def check_stream(trace: Trace, stream_end: Tensor) -> None:
    """Every step has to read what the one before it returned, and the head what the last one returned."""
    readers = [step.before for step in trace.steps[1:]] + [stream(stream_end.detach())]
    names = [step.name for step in trace.steps[1:]] + ["the head"]
    for step, reader, name in zip(trace.steps, readers, names, strict=True):
        written = step.after
        if written.shape[1] != reader.shape[1]:
            raise RecordingError(
                f"{name} reads {reader.shape[1]} tokens, and the step before it returned {written.shape[1]}: tokens "
                "that were dropped, merged or added between the blocks cannot be placed on the image"
            )
        one = written.data_ptr() == reader.data_ptr() and written.stride() == reader.stride()
        if written.shape != reader.shape or not (one or torch.equal(written, reader)):
            raise RecordingError(
                f"{name} does not read what the step before it returned: the model does something between its blocks "
                "that its topology does not know, so relevance cannot be placed"
            )


def reads(slope: Tensor) -> Bool[Tensor, "batch token"]:
    """Which tokens a score has a gradient at."""
    return stream(slope).ne(0).any(-1)


def check_start(trace: Trace, read: Bool[Tensor, "batch token"]) -> None:
    """The head may only read the tokens that the topology says it reads, where that was not seen from the head."""
    if getattr(trace.pooling, "seen", False):
        return
    expected = trace.start("mean").ne(0)
    unexpected = read & ~expected
    # In float16 a cotangent can vanish for want of small numbers.
    exact = isinstance(trace.pooling, FixedPooling) and trace.blocks[0].site.dtype != torch.float16
    missing = expected & ~read & read.any(1, keepdim=True) & exact

    def error() -> RecordingError:
        wrong, does, which = unexpected, "reads", "does not"
        if not bool(wrong.any()):
            wrong, does, which = missing, "does not read", "does"
        return RecordingError(
            f"the head {does} token {int(wrong.nonzero()[0, 1])}, but pooling was recognised as "
            f"{trace.pooling.name!r}, which {which}; expected the head of the family. If several scores read a "
            "part each (a distilled model in train mode), explain their mean with output=; a model with a pooling "
            "of its own needs a topology of its own"
        )

    expect(~(unexpected | missing), error)
