"""``captum-lnstat demo``."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from captum_lnstat.cli import fail
from captum_lnstat.commands.known import ZOO
from captum_lnstat.commands.options import check_model, subject_options
from captum_lnstat.errors import one_line

_EXAMPLES = """\b
Examples:
  captum-lnstat demo
  captum-lnstat demo --port 8080 --threads 4
  captum-lnstat demo --model vit_small_patch16_224 --checkpoint last.ckpt --class-names names.txt
"""


@click.command(epilog=_EXAMPLES)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes any that is free."
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of a model.  [default: torch's]")
@subject_options
def demo(host: str, port: int, threads: int | None, **model: Any) -> None:
    """Serve a page on which images can be explained by clicking: samples, uploads, any model of timm.

    It begins with --model, and with what belongs to it; others are chosen on the page. It can be reached from this
    machine only, unless --host says otherwise; there is no login. Uploaded files are removed after some minutes, and
    all of them when the page is stopped with Ctrl-C. Needs the extra "demo": pip install "captum-lnstat[demo]".
    """
    # Found out before torch is loaded; imported later, when the folder that it takes for its own at import is set.
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
    check_model(model["name"], model["pretrained"], model["checkpoint"], model["class_names"])
    import torch

    from captum_lnstat.commands.models import ModelOptions
    from captum_lnstat.demo.server import LOOPBACK, serve

    if threads is not None:
        torch.set_num_threads(threads)
    if host not in LOOPBACK:
        click.echo("Warning: whoever can reach this machine can use the page; there is no login", err=True)

    def ready(url: str) -> None:
        click.echo(f"the page is at {url} (Ctrl-C stops it)")

    options = ModelOptions(**model)
    plain = ModelOptions(ZOO[0], False, None, None, whole=False, device="auto")
    own = None if options == plain else options.read()
    try:
        serve(host, port, ready, own)
    except OSError as error:
        fail(f"the page cannot be served on {host}, port {port}: {one_line(error.strerror or error)}")
    click.echo("stopped")
