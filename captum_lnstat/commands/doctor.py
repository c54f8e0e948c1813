"""``captum-lnstat doctor``: what is recognised in a model, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import click

from captum_lnstat.commands.names import ModelName
from captum_lnstat.commands.options import check_model


@click.command()
@click.argument("name", type=ModelName(), metavar="MODEL")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--image-size", nargs=2, type=click.IntRange(1), metavar="H W", help="[default: the model's own]")
@click.option("--pretrained", is_flag=True, help="Take the library's weights; they are downloaded.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Weights for the model.")
def doctor(
    name: str, as_json: bool, image_size: tuple[int, int] | None, pretrained: bool, checkpoint: Path | None
) -> None:
    """Say what is recognised in MODEL, or why it is refused.

    MODEL is swin-mini, vit-mini, a name that timm knows, torchvision:NAME, hf:NAME (a configuration class of
    transformers, such as hf:ViTConfig, or a model on the hub) or module:callable, of a module that is installed or in
    the current folder. The exit code is 0 for a
    model that can be explained, 1 for one that is refused, 2 for a command that makes no sense.
    """
    check_model(name, pretrained, checkpoint, None)
    from captum_lnstat.doctor import examine
    from captum_lnstat.explanation.subject.progress import progress
    from captum_lnstat.explanation.subject.subject import read_model

    model, size, weights = read_model(name, pretrained, checkpoint)
    with progress(f"recording {name}"):
        record = examine(model, image_size or size)
    if as_json:
        taken = {"weights": weights} if weights else {}
        click.echo(json.dumps({"name": name, **taken, **record.to_dict()}, indent=2))
    else:
        click.echo(f"{name}: {record}" + f"\nweights: {weights}" * bool(weights))
    if record.refusal is not None:
        click.get_current_context().exit(1)
