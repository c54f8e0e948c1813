"""``captum-lnstat evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from captum_lnstat.cli import INCOMPLETE, fail
from captum_lnstat.commands import known
from captum_lnstat.commands.names import ModelName, Names
from captum_lnstat.commands.options import check_model
from captum_lnstat.errors import near, one_line
from captum_lnstat.evaluation.specs import parse

METHODS = "lnstat,lnstat-contrastive,chefer,attention-rollout,gradcam,frozen-layernorm,ig,saliency"
METRICS = "pointing,energy,iou,ap,positive,negative,two"
EVALUATED = (*known.METHODS, *known.BLIND)
FORMS = ("csv", "parquet")

_EXAMPLES = """\b
Examples:
  captum-lnstat evaluate --output first --limit 40
  captum-lnstat evaluate --data scenes --model swin-mini --output scenes
  captum-lnstat evaluate --data voc:VOCdevkit/VOC2012 --model swin_tiny_patch4_window7_224 --pretrained \\
      --class predicted --methods "lnstat,chefer,gradcam:layers.3.blocks.1.norm1,ig(n_steps=32)" --output voc
  torchrun --nproc-per-node 8 -m captum_lnstat evaluate --data imagenet:ILSVRC2012 ... --output run
"""


@click.command(epilog=_EXAMPLES)
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="KIND[:PATH]",
    help="scenes, imagenet, tiny-imagenet, imagenet-segmentation, voc, coco, folder, human; all but scenes: a path.",
)
@click.option(
    "--only",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Of the data, the samples that the file names, one a line.",
)
@click.option(
    "--model", "name", type=ModelName(), default="swin-mini", show_default=True, metavar="MODEL", help="As for doctor."
)
@click.option("--pretrained", is_flag=True, help="Take the library's weights; they are downloaded.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights for a model of the zoo or of timm.",
)
@click.option(
    "--methods",
    type=Names(EVALUATED),
    default=METHODS,
    show_default=True,
    metavar="A,B",
    help="The others are compared with the first.",
)
@click.option("--metrics", type=Names(known.METRICS), default=METRICS, show_default=True, metavar="A,B")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="New, or to go on with.")
@click.option(
    "--class",
    "explained",
    type=click.Choice(["true", "predicted"]),
    help="Which class is explained.  [default: true if the data have classes]",
)
@click.option(
    "--fill",
    type=click.Choice(["black", "blur", "mean"]),
    help="What replaces pixels.  [default: blur for insertion, black elsewhere]",
)
@click.option(
    "--autocast",
    type=click.Choice(["bfloat16", "float16"]),
    help="In what the model is asked of images with replaced pixels: faster, and rounded.  [default: its own]",
)
@click.option("--fit", type=click.Choice(["squash"]), help="Whole images, whatever their proportions.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="N samples, drawn by --seed.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--skip-broken", is_flag=True, help="Count what cannot be read or explained, and go on.")
@click.option("--device", default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that read images.")
@click.option(
    "--results", type=click.Choice(FORMS), default="csv", show_default=True, help="Form of the numbers of each image."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of the table.")
def evaluate(
    data: str,
    only: Path | None,
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    output: Path,
    explained: str | None,
    fill: str | None,
    autocast: Literal["bfloat16", "float16"] | None,
    fit: Literal["squash"] | None,
    seed: int,
    device: str,
    as_json: bool,
    **rest: Any,
) -> None:
    """Compare attribution methods on a data set, with intervals and paired tests.

    DIR gets results.csv, summary.json, table.md and figure.png. A run that was stopped goes on where it was when the
    same command is given again. Under torchrun the work is shared. The exit code is 0, 1 if images were left out under
    --skip-broken, 2 if it cannot go on.
    """
    _check(data, rest["methods"], rest["metrics"])
    check_model(name, pretrained, checkpoint, None)
    from captum_lnstat.evaluation import subject as subjects
    from captum_lnstat.evaluation.datasets import Only, open_dataset, read_names
    from captum_lnstat.evaluation.run import Settings
    from captum_lnstat.evaluation.run import evaluate as run
    from captum_lnstat.evaluation.team import team as gathered

    try:
        with gathered(device) as team:
            dataset = open_dataset(data)
            if only is not None:
                dataset = Only(dataset, read_names(only))
            subject = subjects.read(
                name, pretrained=pretrained, checkpoint=checkpoint, fit=fit, seed=seed, device=team.device
            )
            chosen: Any = explained or ("true" if dataset.class_names else "predicted")
            settings = Settings(
                data, name, explained=chosen, fill=fill or "", autocast=autocast or "", seed=seed, **rest
            )

            def say(text: str) -> None:
                click.echo(text, err=True)

            summary = run(settings, dataset, subject, output, team, say)
    except (ValueError, OSError, RuntimeError) as error:
        fail(one_line(error))
    if not team.leads:
        return
    click.echo(json.dumps(summary, indent=2) if as_json else (output / "table.md").read_text().rstrip())
    click.echo(f"written to {str(output)!r}", err=True)
    left_out = [f"{len(summary['broken'])} samples left out: files missing or damaged"] if summary["broken"] else []
    for method, found in summary["methods"].items():
        if found["failed"]:
            left_out.append(f"{method} failed on {len(found['failed'])} samples")
    for line in left_out:
        click.echo(line, err=True)
    if not left_out and not any(found["metrics"] for found in summary["methods"].values()):
        count = summary["questions"]
        fail(f"nothing was measured: no metric has a value on these {count} samples; take a larger --limit")
    # torchrun would take another code for a crash, and start the run again.
    if left_out and team.size == 1:
        click.get_current_context().exit(INCOMPLETE)


def _check(data: str, methods: str, metrics: str) -> None:
    """Names that can be told to be wrong without torch."""
    kind, _, path = data.partition(":")
    try:
        asked = [
            ("data", kind, known.DATA),
            *(("metric", spec.name, known.METRICS) for spec in parse(metrics, "metric")),
            # A class goes by its import path, and a layer by its name in the model.
            *(("method", spec.name, EVALUATED) for spec in parse(methods, "method") if ":" not in spec.name),
        ]
    except ValueError as error:
        fail(one_line(error))
    for what, name, names in asked:
        if name not in names:
            fail(f"unknown {what} {name!r}; {near(name, names, 'expected one of ' + ', '.join(names))}")
    if path and not Path(path).exists():
        fail(f"there is no file or folder {path!r}")
