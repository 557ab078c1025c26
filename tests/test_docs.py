"""Every Python block of the README and the documents runs, in order, in one namespace a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from functional_problem import needs_recent_compiler

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = {"lightning", "transformers", "accelerate", "tensorboard", "ignite"}
pytestmark = [  # Lightning's, of tiny data and of torch 2.13, and ZeroRedundancyOptimizer's
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated"),  # Ignite's import of torch's
]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[needs_recent_compiler] * (path.name == "functional.md"), id=path.name)
        for path in PAGES
    ],
)
def test_blocks_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    namespace: dict[str, Any] = {}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        try:
            exec(compile("\n" * line + match[1], str(path), "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            pytest.skip(f"{error.name} is not installed")


def headings(page: Path) -> set[str]:
    """By the names that links have for them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # has comments with #
    lines = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", path.read_text()):
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name} links to {target}"
            assert not heading or heading in headings(page), f"{path.name} links to {heading} of {page.name}"
