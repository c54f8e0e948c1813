"""Trains small vision transformers on photographs: two Swins and a ViT, on 100 classes of Tiny-ImageNet at 64 px.

    python tests/benchmarks/tiny_imagenet.py targets --data tiny-imagenet-100.tar --teacher vit_tiny.safetensors \
        --synsets synset_words.txt
    python tests/benchmarks/tiny_imagenet.py train swin --seed 0 --data tiny-imagenet-100.tar
    python tests/benchmarks/tiny_imagenet.py export swin --seed 0
    python tests/benchmarks/tiny_imagenet.py check --data tiny-imagenet-100.tar

``targets`` writes a teacher's logits, ``train`` learns from them and from the labels, ``export`` writes half-precision
weights beside ``weights/README.md``, and ``check`` measures those on the validation images. ``targets`` and ``train``
go on where they were stopped. Benchmarks take a trained model from `load`.

The recipe is made for few passes on few cores: bfloat16; Muon for the matrices inside the blocks and AdamW for the
rest; a constant learning rate, then a linear descent to nothing; and a first part on images of 32 px, a quarter of the
cost. Only the part at 64 px decides what the model is: windows of 4 x 4 on grids of 16, 8 and 4, shifted on the first
two.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
PIXELS, SMALL_PIXELS, CLASSES = 64, 32, 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEACHER, TEACHER_PIXELS, TEACHER_MEAN, TEACHER_STD = "vit_tiny_patch16_224", 160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# What `timm.create_model` is called with.
ARCHITECTURES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": PIXELS,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 48,
            "depths": (2, 2, 2),
            "num_heads": (2, 4, 8),
            "num_classes": CLASSES,
        },
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {
            "img_size": PIXELS,
            "patch_size": 8,
            "embed_dim": 144,
            "depth": 5,
            "num_heads": 3,
            "num_classes": CLASSES,
        },
    ),
}


def build(architecture: str) -> nn.Module:
    """The untrained model of a name in `ARCHITECTURES`."""
    name, arguments = ARCHITECTURES[architecture]
    return timm.create_model(name, **arguments)


def load(name: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], list[str]]:
    """A trained model, ready to be explained.

    Args:
        name: A file's stem in ``weights``: ``swin-0``, ``swin-1`` or ``vit-0``.

    Returns:
        The model in single precision and evaluation mode, the mean and the standard deviation of its input's channels
        (pixels run from 0 to 1), and the WordNet id of each of its outputs.
    """
    model = build(name.split("-")[0])
    state = load_file(WEIGHTS / f"{name}.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.eval(), MEAN, STD, (WEIGHTS / "classes.txt").read_text().split()


@dataclass
class Split:
    """Images of one split.

    Attributes:
        images: uint8, images x height x width x channels.
        labels: A place in the sorted WordNet ids for each image.
    """

    images: np.ndarray
    labels: Tensor


def read(archive: Path, cache: Path) -> tuple[Split, Split, list[str]]:
    """Training images, validation images and the sorted WordNet ids of a Tiny-ImageNet archive.

    Args:
        archive: A tar file in the data set's original layout.
        cache: A folder that the decoded images are kept in.
    """
    if not (cache / "classes.txt").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        classes = sorted(files["wnids.txt"].decode().split())
        rows = [line.split("\t") for line in files["val/val_annotations.txt"].decode().splitlines()]
        answers = {f"val/images/{row[0]}": row[1] for row in rows}
        for split in ("train", "val"):
            names = sorted(name for name in files if name.startswith(split) and name.endswith(".JPEG"))
            labels = [answers.get(name) or name.split("/")[1] for name in names]
            images = [np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names]
            np.save(cache / f"{split}.npy", np.stack(images))
            np.save(cache / f"{split}_y.npy", np.array([classes.index(label) for label in labels]))
        (cache / "classes.txt").write_text("\n".join(classes) + "\n")
    train, val = (
        Split(np.load(cache / f"{split}.npy", mmap_mode="r"), torch.from_numpy(np.load(cache / f"{split}_y.npy")))
        for split in ("train", "val")
    )
    return train, val, (cache / "classes.txt").read_text().split()


def pixels(split: Split, places: Tensor) -> Tensor:
    """Images at some places, from 0 to 1, channels first."""
    return torch.from_numpy(split.images[places.numpy()]).permute(0, 3, 1, 2).float().div_(255)


def normalised(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Images with the mean and the standard deviation of their channels taken out."""
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def augmented(images: Tensor, generator: torch.Generator, *, size: int) -> Tensor:
    """Images mirrored, cropped (from 0.75 of the side on), and changed a little in brightness and contrast.

    Args:
        images: Pixels from 0 to 1.
        generator: Where the randomness comes from.
        size: Side of the result. At half the side or less, the images are averaged down before they are cropped.
    """
    if size < images.shape[-1]:
        images = F.avg_pool2d(images, images.shape[-1] // size)
    count = len(images)
    scale = torch.empty(count).uniform_(0.75, 1, generator=generator)
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    shift = torch.empty(count, 2).uniform_(-1, 1, generator=generator) * (1.1 - scale)[:, None]
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = torch.empty(2, count, 1, 1, 1).uniform_(-0.2, 0.2, generator=generator)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - middle) * (1 + contrast) + middle * (1 + brightness)


def make_targets(archive: Path, runs: Path, teacher: Path, synsets: Path) -> None:
    """Writes the teacher's logits for the training images, in half precision; rows not yet made are zero.

    Args:
        archive: The data set.
        runs: The folder of everything that is kept between calls.
        teacher: Weights of `TEACHER`.
        synsets: The WordNet ids of its 1000 outputs, first word of each line.
    """
    train, _, classes = read(archive, runs)
    ids = [line.split()[0] for line in synsets.read_text().splitlines()]
    columns = torch.tensor([ids.index(name) for name in classes])
    model = timm.create_model(TEACHER)
    model.load_state_dict({key: value.float() for key, value in load_file(teacher).items()})
    model.set_input_size(TEACHER_PIXELS)
    model.eval()
    path = runs / "targets.npy"
    targets = torch.from_numpy(np.load(path)) if path.exists() else torch.zeros(len(train.labels), CLASSES).half()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    todo = order[(targets[order] == 0).all(dim=1)]
    done = right = 0
    for places in todo.split(50):
        images = F.interpolate(pixels(train, places), size=(TEACHER_PIXELS, TEACHER_PIXELS), mode="bicubic")
        images = normalised(images.clamp(0, 1), TEACHER_MEAN, TEACHER_STD)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(images)[:, columns].float()
        targets[places] = logits.half()
        done += len(places)
        right += (logits.argmax(dim=1) == train.labels[places]).sum().item()
        if done % 2000 == 0 or done == len(todo):
            save_whole(path, lambda file: np.save(file, targets.numpy()))
            print(f"{done} of {len(todo)}, top-1 {right / done:.3f}, {done / time.process_time():.0f}/s", flush=True)


def save_whole(path: Path, write) -> None:
    """Writes a file beside its place and then moves it there, so that it is never seen half written."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        write(file)
    part.replace(path)


def loss_of(logits: Tensor, labels: Tensor, targets: Tensor, *, temperature: float = 2.0, soft: float = 0.7) -> Tensor:
    """Cross-entropy with the labels, and with the teacher where it has said something.

    Args:
        logits: Images x classes.
        labels: The class of each image.
        targets: The teacher's logits; a row of zeros is a missing one.
        temperature: What both models' logits are divided by where they are compared.
        soft: The teacher's weight.
    """
    known = soft * (targets != 0).any(dim=1).float()
    hard = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    wanted = (targets / temperature).softmax(dim=1)
    divergence = F.kl_div((logits / temperature).log_softmax(dim=1), wanted, reduction="none").sum(dim=1)
    return ((1 - known) * hard + known * temperature**2 * divergence).mean()


def optimisers(model: nn.Module, *, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and mergings, AdamW for everything else; no decay on vectors and tables.

    Args:
        model: What is trained.
        muon: Learning rate of Muon, in AdamW's units.
        adam: Learning rate of AdamW.
    """
    inner, outer, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "table" not in name and "head" not in name:
            inner.append(parameter)
        elif parameter.ndim > 1 and "table" not in name and "pos_embed" not in name and "token" not in name:
            outer.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": outer, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=adam, betas=(0.9, 0.98))]
    if muon:
        made.append(torch.optim.Muon(inner, lr=muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    else:
        made[0].add_param_group({"params": inner, "weight_decay": 0.05})
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made


def resize(model: nn.Module, size: int) -> None:
    """Makes a model take images of another side, its windows as they were where they fit the grid."""
    if hasattr(model, "layers"):
        model.set_input_size((size, size), window_size=(4, 4))
    else:
        model.set_input_size((size, size))


def rate(seen: int, budget: int, since: int) -> float:
    """The learning rate as a part of its peak.

    Args:
        seen: Images so far.
        budget: Images at the end.
        since: Images since the optimisers were made; they are warmed up over 10,000 images.
    """
    return min(1.0, (since + 128) / 10_000, max(0.0, (budget - seen) / (0.5 * budget)))


@torch.inference_mode()
def outputs(model: nn.Module, split: Split, size: int = PIXELS) -> Tensor:
    """Logits of a split's images."""
    model.eval()
    rows = []
    for places in torch.arange(len(split.labels)).split(125):
        images = pixels(split, places)
        images = F.avg_pool2d(images, PIXELS // size) if size < PIXELS else images
        rows.append(model(normalised(images)))
    model.train()
    return torch.cat(rows)


def hits(logits: Tensor, labels: Tensor, top: int) -> float:
    """The part of the images whose label is among the largest logits."""
    return (logits.topk(top, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()


def train(options: argparse.Namespace) -> None:
    """Trains one model from its last checkpoint on, until its budget of images is spent or it is asked to stop."""
    data, val, _ = read(options.data, options.runs)
    place = options.runs / f"{options.architecture}-{options.seed}.pt"
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = build(options.architecture)
    state = torch.load(place) if place.exists() else {"seen": 0, "since": 0, "seconds": 0.0, "size": 0, "order": []}
    start = SMALL_PIXELS if options.small else PIXELS
    resize(model, state["size"] or start)
    made = optimisers(model, muon=options.muon, adam=options.adam)
    if place.exists():
        model.load_state_dict(state.pop("model"))
        for optimiser, kept in zip(made, state.pop("optimisers"), strict=True):
            optimiser.load_state_dict(kept)
        generator.set_state(state.pop("generator"))
    else:
        state["size"] = start

    def keep() -> None:
        kept = {"model": model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in made]}
        kept |= {"generator": generator.get_state(), **state}
        save_whole(place, lambda file: torch.save(kept, file))

    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    path, when = options.runs / "targets.npy", 0.0
    last, cpu, losses = time.monotonic(), time.process_time(), []
    model.train()
    begun, over = last, False
    while not over and not asked:
        if path.exists() and path.stat().st_mtime > when:
            when = path.stat().st_mtime
            targets = torch.from_numpy(np.load(path))
        elif not path.exists():
            targets = torch.zeros(len(data.labels), CLASSES)
        if state["size"] == SMALL_PIXELS and state["seen"] >= options.small:
            state |= {"size": PIXELS, "since": 0}
            resize(model, PIXELS)
            made = optimisers(model, muon=options.muon, adam=options.adam)
        if len(state["order"]) < options.batch:
            state["order"] = torch.randperm(len(data.labels), generator=generator)
        places, state["order"] = state["order"][: options.batch], state["order"][options.batch :]
        images = normalised(augmented(pixels(data, places), generator, size=state["size"]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = loss_of(logits.float(), data.labels[places], targets[places].float())
        loss.backward()
        if options.minutes:
            factor = min(
                max(0.0, 1 - (time.monotonic() - begun) / (60 * options.minutes)), (state["since"] + 128) / 10_000
            )
        else:
            factor = rate(state["seen"], options.images, state["since"])
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimiser in made:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
            optimiser.step()
            optimiser.zero_grad()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"The loss is {loss.item()} after {state['seen']} images.")
        losses.append(loss.item())
        state["seen"] += len(places)
        state["since"] += len(places)
        over = factor == 0 if options.minutes else state["seen"] >= options.images
        if time.monotonic() - last > 60 * options.every or over or asked:
            state["seconds"] += time.process_time() - cpu
            cpu, last = time.process_time(), time.monotonic()
            keep()
            part = val if over else Split(val.images[::4], val.labels[::4])
            logits = outputs(model, part, state["size"])
            print(
                f"{time.strftime('%H:%M')} {state['seen']} images at {state['size']} px, loss {np.mean(losses):.3f}, "
                f"top-1 {hits(logits, part.labels, 1):.4f}, top-5 {hits(logits, part.labels, 5):.4f} of "
                f"{len(part.labels)}, {state['seen'] / state['seconds']:.0f}/s",
                flush=True,
            )
            losses, cpu = [], time.process_time()


def export(options: argparse.Namespace) -> None:
    """Writes a checkpoint's weights in half precision."""
    state = torch.load(options.runs / f"{options.architecture}-{options.seed}.pt")
    model = build(options.architecture)
    resize(model, state["size"])
    model.load_state_dict(state["model"])
    resize(model, PIXELS)
    WEIGHTS.mkdir(exist_ok=True)
    half = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    path = WEIGHTS / f"{options.architecture}-{options.seed}.safetensors"
    save_file(half, path)
    (WEIGHTS / "classes.txt").write_text((options.runs / "classes.txt").read_text())
    print(f"{path.name}: {state['seen']} images, {state['seconds']:.0f} CPU seconds, {path.stat().st_size} bytes")


def check(options: argparse.Namespace) -> None:
    """Measures the kept weights on the validation images, with 95 % intervals (Wilson)."""
    _, val, classes = read(options.data, options.runs)
    for path in sorted(WEIGHTS.glob("*.safetensors")):
        model, _, _, names = load(path.stem)
        assert names == classes
        logits, count = outputs(model, val), len(val.labels)
        print(f"{path.stem}: {sum(p.numel() for p in model.parameters())} parameters, {path.stat().st_size} bytes")
        for top in (1, 5):
            found = hits(logits, val.labels, top)
            middle = (found + 1.92 / count) / (1 + 3.84 / count)
            half = 1.96 / (1 + 3.84 / count) * math.sqrt(found * (1 - found) / count + 0.96 / count**2)
            print(
                f"  top-{top} {100 * found:.2f} % [{100 * (middle - half):.1f}, {100 * (middle + half):.1f}] of {count}"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["targets", "train", "export", "check"])
    parser.add_argument("architecture", nargs="?", choices=list(ARCHITECTURES), default="swin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="tiny-imagenet-100.tar")
    parser.add_argument("--runs", type=Path, default=Path("tiny-imagenet-runs"), help="what is kept between calls")
    parser.add_argument("--teacher", type=Path, help=f"weights of {TEACHER}")
    parser.add_argument("--synsets", type=Path, help="the WordNet ids of the teacher's outputs")
    parser.add_argument("--images", type=int, default=600_000, help="images to see; may be changed between calls")
    parser.add_argument("--minutes", type=float, help="instead of --images: descend by the clock, for so long from now")
    parser.add_argument("--small", type=int, default=250_000, help=f"how many of them at {SMALL_PIXELS} px, first")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--muon", type=float, default=4e-3, help="Muon's learning rate; 0: AdamW for everything")
    parser.add_argument("--adam", type=float, default=2e-3, help="AdamW's learning rate")
    parser.add_argument("--every", type=float, default=3, help="minutes between two checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if options.do == "targets":
        make_targets(options.data, options.runs, options.teacher, options.synsets)
    else:
        {"train": train, "export": export, "check": check}[options.do](options)


if __name__ == "__main__":
    main()
