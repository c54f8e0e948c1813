"""Several images on the command line: what is broken is named and counted, what is finished stays, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import captum_lnstat
from captum_lnstat import UnsupportedModelError, cli, zoo
from captum_lnstat.commands import comparing, explain, explaining, models, options, pictures
from captum_lnstat.explanation.explainer import Explainer
from captum_lnstat.explanation.subject import progress as _console
from captum_lnstat.visualize import Look


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(_console, "FIRST_WORD", 600.0)


@pytest.fixture
def photos(tmp_path):
    """Two images, something that is called one, and something that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, scene in zip(("a", "c"), zoo.scenes()[:2], strict=True):
        scene.image.save(folder / f"{name}.png")
    (folder / "b.png").write_text("no image")
    (folder / "notes.txt").write_text("notes")
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="captum-lnstat")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def files() -> list[str]:
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file())


def test_a_folder_is_explained_and_what_is_broken_is_named_and_counted(photos):
    result = run("explain", photos)
    assert result.exit_code == 1
    assert files() == ["lnstat/a.png", "lnstat/c.png"]
    first, last = result.stdout.splitlines()
    assert first.startswith("a: predicted ")
    assert first.endswith(", lnstat/a.png")
    assert last.startswith("c: predicted ")
    assert f"Skipped {photos / 'b.png'}: " in result.stderr
    assert result.stderr.endswith("1 of 3 images skipped\n")
    with Image.open("lnstat/a.png") as file:
        assert file.size == (64, 64)


def test_nothing_broken_is_exit_code_zero_and_the_pictures_are_those_of_single_images(photos):
    (photos / "b.png").unlink()
    assert run("explain", photos, "--output", "new/maps", "--rule", "rollout").exit_code == 0
    assert files() == ["new/maps/a.png", "new/maps/c.png"]
    assert (
        run("explain", photos / "c.png", "--rule", "rollout", "--picture", "overlay", "--output", "c.png").exit_code
        == 0
    )
    assert Path("c.png").read_bytes() == Path("new/maps/c.png").read_bytes()


def test_one_json_object_a_line_and_one_for_what_was_skipped(photos):
    result = run("explain", photos, "--json", "--target", "bag")
    assert result.exit_code == 1
    first, broken, last = map(json.loads, result.stdout.splitlines())
    assert (first["image"], first["target_name"], first["picture"]) == (str(photos / "a.png"), "bag", "lnstat/a.png")
    assert broken["image"] == str(photos / "b.png")
    assert "cannot be read as an image" in broken["error"]
    assert len(last["grid"]) == 16
    single = json.loads(run("explain", photos / "a.png", "--json", "--target", "bag", "--picture", "overlay").stdout)
    assert single == {**first, "picture": "lnstat.png"}


def test_the_whole_image_is_seen_if_asked_for(photos):
    zoo.scenes()[0].image.resize((128, 64)).save(photos / "wide.png")
    asked = ["explain", photos / "wide.png", "--json", "--picture", "original", "--output", "wide.png"]
    assert json.loads(run(*asked).stdout)["box"] == pytest.approx([32, 0, 96, 64], abs=0.5)
    assert json.loads(run(*asked, "--whole").stdout)["box"] == [0, 0, 128, 64]
    with Image.open("wide.png") as file:
        assert file.size == (128, 64)


def test_files_of_one_name_do_not_overwrite_each_other(photos):
    (photos / "more").mkdir()
    zoo.scenes()[2].image.save(photos / "more" / "a.png")
    assert run("explain", photos / "a.png", photos / "more" / "a.png").exit_code == 0
    assert files() == ["lnstat/a-2.png", "lnstat/a.png"]


def test_only_broken_images_are_a_failure(photos):
    for name in ("a.png", "c.png"):
        (photos / name).write_text("no image either")
    result = run("explain", photos)
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: none of 3 images could be explained\n")
    assert files() == []


def test_a_model_that_is_refused_is_refused_once(photos, monkeypatch):
    def refuse(*arguments):
        raise UnsupportedModelError("no transformer")

    monkeypatch.setattr(Explainer, "explain", refuse)
    result = run("explain", photos)
    assert result.exit_code == 2
    assert result.stderr == "Error: swin-mini cannot be explained: no transformer\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{photos}", "--output", "{photos}"], "is that of the images; expected another"),
        (["{photos}", "--output", "{photos}/notes.txt"], "exists and is no folder"),
        (["{photos}/more"], "there is no file"),
        (["{photos}", "--scene", "3"], "exclude each other"),
        (["{photos}", "--against", "bag"], "--against is for --picture classes"),
        (["--picture", "classes", "--target", "bag", "--against", "bag"], "--against is the target itself, bag (5)"),
        (["--picture", "layers", "--rule", "gradient"], "rule 'gradient' is not read at the blocks"),
        (["--picture", "overlay", "--output", "a.pdx"], "cannot be written as 'a.pdx'"),
        (["--picture", "portrait"], "'portrait' is not one of"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(photos, arguments, says):
    result = run("explain", *(argument.format(photos=photos) for argument in arguments))
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]
    assert files() == []


def test_a_folder_without_images_is_said_to_be_one(tmp_path):
    assert "there is no image in the folder" in run("explain", tmp_path / "here").stderr
    assert "there is no image in the folder" in run("compare", tmp_path / "here").stderr


@pytest.mark.parametrize("kind", ["layers", "heads", "classes", "original"])
def test_every_kind_of_picture_is_drawn(monkeypatch, kind):
    drawn = []
    monkeypatch.setattr(pictures, "write_figure", lambda path, figure, about: drawn.append(figure))
    result = run("explain", "--picture", kind, "--model", "vit-mini", "--target", "trouser")
    assert result.exit_code == 0, result.stderr
    if kind == "original":
        assert files() == ["lnstat.png"]
        return
    words = " ".join(text.get_text() for text in drawn[0].texts)
    assert {"layers": "residual share", "heads": "head 2", "classes": "minus"}[kind] in words
    assert "trouser" in words


def test_the_other_class_is_the_one_asked_for_or_the_likeliest(monkeypatch):
    asked = []
    monkeypatch.setattr(pictures, "class_sheet", lambda *arguments, **options: asked.append(arguments[3]))
    monkeypatch.setattr(pictures, "write_figure", lambda path, figure, about: None)
    reference = zoo.load("swin-mini")
    inputs = reference.transform(zoo.scenes()[explain.DEFAULT_SCENE].image)[None]
    best, second = reference.model(inputs)[0].topk(2).indices.tolist()
    for arguments in ([], ["--target", str(second)], ["--against", "bag"]):
        assert run("explain", "--picture", "classes", *arguments).exit_code == 0
    assert asked == [(best, second), (second, best), (best, 5)]


def test_an_interrupted_run_keeps_what_is_finished(photos, monkeypatch):
    written = pictures.write_picture

    def interrupt(path, *arguments):
        if path.name == "c.png":
            raise KeyboardInterrupt
        written(path, *arguments)

    monkeypatch.setattr(explaining, "write_picture", interrupt)
    result = run("explain", photos)
    assert result.exit_code == 130
    assert result.stderr.endswith("Interrupted\n")
    assert files() == ["lnstat/a.png"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_the_middle_of_writing_leaves_whole_files(tmp_path, photos):
    """The real signal, in a process of its own, while half of the second picture is on the disk."""
    code = """
        import os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        from PIL import Image
        from captum_lnstat.cli import main
        save, count = Image.Image.save, []
        def slow(self, file, format, **options):
            count.append(1)
            if len(count) == 2:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGINT)
            save(self, file, format=format, **options)
        Image.Image.save = slow
        main(prog_name="captum-lnstat")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(captum_lnstat.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "explain", str(photos)],
        cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("Interrupted\n")
    assert files() == ["lnstat/a.png"]


def test_compare_draws_methods_by_rows_and_images_by_columns(photos, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparing, "compare_sheet", lambda *arguments, **options: drawn.append((arguments, options)))
    monkeypatch.setattr(comparing, "write_figure", lambda path, figure: Path(path).write_text("sheet"))
    result = run("compare", photos, "--methods", "lnstat,chefer", "--target", "bag", "--json")
    assert result.exit_code == 1
    (((columns, methods, title), how),) = drawn
    assert [column.title.splitlines()[0] for column in columns] == ["a", "c"]
    assert all(len(column.maps) == 2 for column in columns)
    assert [method.title for method in methods] == ["LNStat", "Chefer et al. 2021"]
    assert (title, how) == ("swin-mini", {"scale": "map", "look": Look()})
    record = json.loads(result.stdout)
    assert record["methods"] == ["lnstat", "chefer"]
    assert [each["image"] for each in record["images"]] == [str(photos / "a.png"), str(photos / "c.png")]
    assert [each["image"] for each in record["skipped"]] == [str(photos / "b.png")]
    assert files() == ["compare.png"]
    assert run("compare", photos / "a.png", "--methods", "lnstat", "--scale", "shared").exit_code == 0
    assert drawn[1][1]["scale"] == "shared"


def test_compare_writes_a_sheet_of_the_bundled_scenes():
    result = run("compare", "--scene", 264, "--methods", "rollout,evidence", "--model", "vit-mini")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "picture: compare.png"
    with Image.open("compare.png") as sheet:
        assert sheet.height > sheet.width > 400


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "lnstat,chefr"], "unknown method 'chefr'; did you mean 'chefer'?"),
        (["--methods", " ,"], "--methods is empty"),
        (["--scene", "400"], "there is no scene 400; expected 0 to 399"),
        (["--output", "nowhere/a.png"], "there is no folder 'nowhere'"),
        (["a.png"] * 17, "17 images are too many for one sheet; expected at most 16"),
        (["a.png", "--scene", "1"], "exclude each other"),
    ],
)
def test_a_mistake_in_compare_is_one_line(arguments, says):
    result = run("compare", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]
    assert files() == []


def test_an_assumed_preprocessing_is_said(monkeypatch, capsys):
    subject = models.read_subject("swin-mini")
    object.__setattr__(subject, "preprocessing", type(subject.preprocessing)(subject.transform, "the usual one", True))
    options.warn(subject.cautions())
    assert "does not say how its images were prepared; the usual one is taken" in capsys.readouterr().err
