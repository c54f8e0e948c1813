"""The README's Python runs as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_snippets_run_in_order(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 2
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["by_statistics"].shape == names["by_gradients"].shape == names["image"].shape
    assert names["grid"].shape == (1, 16, 16)
    assert abs(float(names["delta"])) < 1e-4
    assert "windowed transformer, 16 x 16 patches" in capsys.readouterr().out


def test_every_linked_file_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert all((page.parent / link).exists() for link in links), page


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
