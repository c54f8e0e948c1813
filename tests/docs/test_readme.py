"""The README: it is short, its Python runs as it stands, and its figures are those of the pages that it links to."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Rows of the README: the page, and the method's name there.
IN_QUALITY = {
    "**lnstat**": ("real", "lnstat"),
    "LibraGrad 2025": ("real", "libragrad"),
    "Chefer et al. 2021": ("real", "chefer"),
    "Grad-CAM, last block": ("real", "gradcam"),
    "attention rollout": ("real", "attention-rollout"),
    "*a spot in the centre*": ("real", "centre"),
}
# Where their numbers stand: heading and column, of boxes and of mosaics.
COLUMNS = {
    "real": (("### Boxes", "iou ↑"), ("### Mosaics", "grid(size=full,ask=all) ↑")),
    "rivals": (("### Where the object is", "IoU ↑"), ("### Which class, and how faithful", "mosaic energy ↑")),
}
IN_COST = {
    "**lnstat**": "LNStatAttribution, lnstat",
    "lnstat, 100 classes at once": "LNStatAttribution, 100 classes",
    "torchcam, Grad-CAM": "torchcam GradCAM",
    "Captum, LayerGradCam": "Captum LayerGradCam",
    "Chefer et al. 2021": "GenericAttention",
    "pytorch-grad-cam, Grad-CAM": "pytorch-grad-cam GradCAM",
}


def rows(text):
    """The tables of a text as one: the first cell of a row, and the others."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {first: rest for first, *rest in cells}


def part(heading, text=README):
    """What stands below a heading, up to the next of its kind."""
    mark = re.match("#+ ", heading)[0]
    return text.split(f"\n{heading}", 1)[1].split(f"\n{mark}", 1)[0]


def test_it_is_short():
    assert len(README.split()) <= 900


def test_its_commands_are_those_that_ci_runs():
    first, second = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    assert first.splitlines()[1:] == ["pip install .", "captum-lnstat explain"]
    assert second.splitlines()[1:] == ['pip install -e ".[test]"', "pytest"]


def test_the_snippets_run_in_order(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["attribution"].shape == names["image"].shape
    assert names["grid"].shape == (1, 16, 16)
    assert "windowed transformer, 16 x 16 patches" in capsys.readouterr().out


def test_the_quality_is_that_of_the_pages():
    table = rows(part("## How good"))
    assert table.keys() - {"method"} == IN_QUALITY.keys()
    for method, (name, row) in IN_QUALITY.items():
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        expected = []
        for model in ("deit_tiny_patch16_224", "vit_tiny_patch16_224", "swin-0"):
            for heading, quantity in COLUMNS[name]:
                measured = rows(part(heading, part(f"## {model}", page)))
                found = measured[row][measured["method"].index(quantity)]
                expected.append(found if row == "lnstat" else re.sub(r" \[.*\]", "", found))
        assert table[method] == expected, method


def test_the_cost_is_that_of_the_record():
    times = json.loads((ROOT / "docs" / "cost.json").read_text(encoding="utf-8"))["time"]
    table = rows(part("## What does it cost"))
    assert table.keys() - {"method", "---"} == IN_COST.keys()
    for method, name in IN_COST.items():
        settings = ("vit_small_patch16_224@224x4", "swin_tiny_patch4_window7_224@224x4")
        assert table[method] == [f"{times[setting][name]['median']:.2f}" for setting in settings], method


def anchors(page):
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_linked_file_and_heading_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_the_page_of_a_package_index_runs_and_needs_nothing_beside_it():
    """Relative links and pictures lead nowhere there."""
    text = (ROOT / "docs" / "package" / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(compile(snippet, "package/README.md", "exec"), names)
    assert names["attribution"].shape == names["image"].shape
    assert 'readme = "docs/package/README.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
