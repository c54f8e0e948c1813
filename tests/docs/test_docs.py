"""The documentation: its Python runs, its pages are in the tree, and what it names is there."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

import captum_lnstat

DOCS = Path(__file__).parents[2] / "docs"
# Pages whose code other files run, and look at the results of.
ELSEWHERE = {"captum.md": "test_captum_page.py", "adding-a-family.md": "test_adding_a_family.py"}


@dataclass(frozen=True)
class Block:
    """A fenced block of Python, and why it is not run if it is not."""

    page: str
    line: int
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?:python|py)\n(?P<code>.*?)^```$", text, re.M | re.S
    )
    return [
        Block(page.name, text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in found
    ]


PAGES = {page.name: blocks(page) for page in sorted(DOCS.glob("*.md")) if page.name not in ELSEWHERE}
RUN = {name: found for name, found in PAGES.items() if any(block.reason is None for block in found)}
LEFT_OUT = [block for found in PAGES.values() for block in found if block.reason is not None]


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)  # pages write pictures and weights
    names: dict[str, Any] = {}
    for block in RUN[name]:
        if block.reason is None:
            # Blank lines before it, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(DOCS / name), "exec"), names)


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_kept_without_its_outputs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which costs no kernel; the site's build runs it in one and shows what came out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: f"{block.page}:{block.line}")
def test_python_that_is_not_run_is_python(block: Block) -> None:
    compile(block.code, block.page, "exec")
    pytest.skip(f"{block.page}:{block.line} is not run: {block.reason}")


def test_every_block_of_python_is_found() -> None:
    for page in DOCS.glob("*.md"):
        fences = re.findall(r"^\s*```\s*py", page.read_text(encoding="utf-8"), re.M | re.I)
        assert len(fences) == len(blocks(page)), page.name
    for name, test in ELSEWHERE.items():
        assert name in (Path(__file__).parent / test).read_text(encoding="utf-8")


def test_every_page_is_in_the_tree() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.S))
    listed = {line for line in trees.splitlines() if line and not line.startswith(":")}
    pages = {
        page.relative_to(DOCS).with_suffix("").as_posix()
        for page in DOCS.rglob("*")
        if "package" not in page.parts and page.suffix in {".md", ".ipynb"}
    }
    assert pages - listed == {"index"}
    assert not listed - pages


def test_links_inside_the_site() -> None:
    pages = {page.stem for page in DOCS.glob("*.md")}
    for name in re.findall(r"\]\(([\w-]+)\.html\)", (DOCS / "llms.txt").read_text(encoding="utf-8")):
        assert name in pages, f"llms.txt links to {name}"
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{page.name} shows {target}"


def test_the_reference_has_every_public_name() -> None:
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in captum_lnstat.__all__:
        if not name.startswith("__"):
            assert re.search(rf":: (captum_lnstat\.)?{name}$", api, re.M), f"docs/api.md leaves {name} out"


def test_what_troubleshooting_quotes_is_said() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.split("## Messages of this package")[1]
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (DOCS.parent / "captum_lnstat").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # a message over several lines of source
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(quoted) >= 6
    for message in quoted:
        for part in (part.strip() for part in message.split("...")):
            wanted = (
                re.escape(part).replace(r"a\ tuple\ of\ 2", r"a\ tuple\ of\ \{[^}]*\}").replace("rule=", r"rule=\{?")
            )
            assert not part or re.search(wanted, joined), f"no message says {part!r}"


@pytest.mark.parametrize("word", ["heatmap", "saliency", "CAM"])
def test_the_words_of_other_tools_are_headings_of_the_glossary(word: str) -> None:
    """Headings are what the site's search ranks first."""
    headings = re.findall(r"^## (.*)$", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert any(word.lower() in heading.lower().replace(",", "").split() for heading in headings)
