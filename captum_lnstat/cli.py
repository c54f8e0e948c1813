"""The command ``captum-lnstat``: a group whose commands are imported when they are run."""

from __future__ import annotations

import click

from captum_lnstat._lazy_group import Entry, LazyGroup
from captum_lnstat._version import __version__

_COMMANDS = {
    "explain": Entry("captum_lnstat.commands.explain:explain", "Explain an image, or a folder of them."),
    "compare": Entry("captum_lnstat.commands.compare:compare", "Several methods on several images, on one sheet."),
    "evaluate": Entry(
        "captum_lnstat.evaluation.command:evaluate", "Measure methods on a data set of images.", "evaluate"
    ),
    "doctor": Entry("captum_lnstat.commands.doctor:doctor", "Say what is recognised in a model, or why it is refused."),
    "demo": Entry("captum_lnstat.demo.command:demo", "Serve a web page to try it on.", "demo"),
}

# The bytes \b keep click from running the lines together.
_EPILOG = """\b
Examples:
  captum-lnstat explain
  captum-lnstat explain cat.jpg --model vit_small_patch16_224 --pretrained --target "tabby cat"
  captum-lnstat doctor torchvision:swin_t

\b
Completion in the shell, here bash (or zsh_source, fish_source):
  eval "$(_CAPTUM_LNSTAT_COMPLETE=bash_source captum-lnstat)"

Exit codes: 0 done; 1 done in part, or the model is refused; 2 nothing could be done; 130 interrupted.
"""


@click.group(
    cls=LazyGroup,
    entries=_COMMANDS,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="captum-lnstat")
@click.pass_context
def main(context: click.Context) -> None:
    """Explain what a ViT or Swin model looked at, and what of it argued for a class."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
