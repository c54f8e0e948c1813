"""Commands that are imported when they are run: help, completion, and packages that are missing."""

from __future__ import annotations

import subprocess
import sys
import types

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from captum_lnstat import cli
from captum_lnstat.cli import Entry, LazyGroup


def group(**entries: Entry) -> LazyGroup:
    return LazyGroup("group", entries=entries, help="A group.")


@pytest.fixture
def here(monkeypatch):
    """A module with commands, as ``here:name``."""
    module = types.ModuleType("here")
    module.hello = click.Command("hello", callback=lambda: click.echo("hello"), help="Long help.")

    def needs() -> None:
        raise ModuleNotFoundError("No module named 'gradio.blocks'", name="gradio.blocks")

    module.needs = click.Command("needs", callback=needs)
    monkeypatch.setitem(sys.modules, "here", module)
    return module


def test_a_command_is_imported_when_it_is_run_and_not_before(here):
    commands = group(hello=Entry("here:hello", "Say it."), broken=Entry("nowhere.at.all:command", "Never."))
    listed = CliRunner().invoke(commands, ["--help"])
    assert listed.exit_code == 0
    assert "hello   Say it." in listed.stdout
    assert "broken  Never." in listed.stdout
    assert CliRunner().invoke(commands, ["hello"]).stdout == "hello\n"
    assert "Long help." in CliRunner().invoke(commands, ["hello", "--help"]).stdout
    assert CliRunner().invoke(commands, ["nope"]).exit_code == 2


@pytest.mark.parametrize("path", ["here:needs", "no_such_package_at_all.module:command"])
def test_a_missing_package_is_one_line_that_names_the_extra(here, path):
    result = CliRunner().invoke(group(page=Entry(path, "A page.", extra="demo")), ["page"])
    missing = "gradio" if path == "here:needs" else "no_such_package_at_all"
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: page needs {missing}, which is not installed; pip install 'captum-lnstat[demo]' brings it\n"
    )


def test_a_module_of_the_package_itself_is_no_missing_extra(here):
    for entry in (Entry("captum_lnstat.nowhere:command", "Gone.", extra="demo"), Entry("here:needs", "No extra.")):
        assert isinstance(CliRunner().invoke(group(page=entry), ["page"]).exception, ModuleNotFoundError)


def test_an_interrupted_command_has_the_shells_exit_code(here):
    def interrupt() -> None:
        raise KeyboardInterrupt

    here.stop = click.Command("stop", callback=interrupt)
    result = CliRunner().invoke(group(stop=Entry("here:stop", "Stop.")), ["stop"])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted\n"


def test_a_warning_is_its_text_alone(tmp_path):
    """In a process of its own: here pytest takes warnings before they are written."""
    (tmp_path / "there.py").write_text(
        "import warnings, click\n"
        "hello = click.Command('hello', callback=lambda: warnings.warn('the map is\\nempty', stacklevel=1))\n"
    )
    code = (
        "from captum_lnstat.cli import Entry, LazyGroup\n"
        "LazyGroup('group', entries={'hello': Entry('there:hello', '')})(['hello'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stderr == "Warning: the map is empty\n"


def test_completion_lists_the_commands_without_importing_them(here):
    commands = group(hello=Entry("here:hello", "Say it."), help=Entry("nowhere.at.all:command", "Never."))
    complete = ShellComplete(commands, {}, "group", "_GROUP_COMPLETE")
    items = [(item.value, item.help) for item in complete.get_completions([], "he")]
    assert items == [("hello", "Say it."), ("help", "Never.")]
    assert "--help" in [item.value for item in complete.get_completions([], "--")]


def test_options_of_a_command_are_completed():
    complete = ShellComplete(cli.main, {}, "captum-lnstat", "_CAPTUM_LNSTAT_COMPLETE")
    assert "--picture" in [item.value for item in complete.get_completions(["explain"], "--pic")]
    kinds = [item.value for item in complete.get_completions(["explain", "--picture"], "")]
    assert kinds == ["sheet", "overlay", "original", "layers", "heads", "classes"]
    assert next(item.value for item in complete.get_completions([], "e")) == "explain"


def test_help_and_version_load_neither_torch_nor_matplotlib():
    code = """
import sys
from captum_lnstat.cli import main
try:
    main(["--help"], prog_name="captum-lnstat")
except SystemExit:
    pass
loaded = {"torch", "timm", "captum", "matplotlib", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    for name in ("explain", "compare", "evaluate", "doctor", "demo"):
        assert f"\n  {name} " in done.stdout
    assert '  eval "$(_CAPTUM_LNSTAT_COMPLETE=bash_source captum-lnstat)"\n' in done.stdout
    assert "130 interrupted" in done.stdout


@pytest.mark.parametrize("name", ["explain", "compare", "doctor"])
def test_every_command_has_help_with_its_exit_codes(name):
    result = CliRunner().invoke(cli.main, [name, "--help"], prog_name="captum-lnstat")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: captum-lnstat {name} ")
    assert "xit code" in result.stdout
    if name != "doctor":
        assert f"captum-lnstat {name}\n" in result.stdout


@pytest.mark.parametrize("name", list(cli.main.entries))
def test_every_command_of_the_table_is_there(name):
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str()
