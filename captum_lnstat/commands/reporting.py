"""What ``captum-lnstat report`` does once its options are known to make sense."""

from __future__ import annotations

from pathlib import Path

import click

from captum_lnstat.attribution.methods import method_of_rule
from captum_lnstat.cli import fail
from captum_lnstat.commands.explaining import Request, each_image
from captum_lnstat.commands.options import Skipped, warn
from captum_lnstat.errors import one_line
from captum_lnstat.explanation.subject.progress import ProgressBar
from captum_lnstat.report.page import card, page, room
from captum_lnstat.visualize.writing import write_whole


def write_report(paths: tuple[Path, ...], output: Path, request: Request, pictures: int) -> None:
    """Explain the images, and write the page whole; what cannot be explained is named on it."""
    explainer, wanted = request.explainer()
    cautions = [*explainer.subject.cautions(), *request.model.cautions]
    warn(cautions)
    skipped = Skipped(len(paths))
    cards, classes = [], set()
    with ProgressBar(total=len(paths), unit="image", disable=None) as bar:
        for _, _, found in each_image(explainer, paths, wanted, request, skipped, bar):
            cards.append(card(found, room(pictures), cautions))
            classes.add(found[0].prediction)
            bar.update()
    skipped.check()
    text = page(
        cards,
        title=explainer.subject.title,
        summary=f"{len(cards)} image{'s' * (len(cards) != 1)}, {len(classes)} predicted "
        f"class{'es' * (len(classes) != 1)}, rule {request.rule}",
        look=request.look,
        signed=method_of_rule(request.rule).signed,
        made=explainer.provenance.to_dict(),
        cautions=cautions,
        skipped=skipped.records,
    )
    try:
        write_whole(output, lambda file: file.write(text.encode()))
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
    click.echo(f"{len(cards)} image{'s' * (len(cards) != 1)}, {output}, {len(text) / 1e6:.1f} MB")
    skipped.finish()
