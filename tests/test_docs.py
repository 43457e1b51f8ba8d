"""The documents: their Python runs, each page as one program, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FRAMEWORKS = ("torch", "tensorflow", "keras")  # in the order in which one process can import them
# Of a process group of one, where `torchrun` would say it of more.
GROUP = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def program(text: str, with_gpu: bool = False) -> str:
    """The blocks of Python in a page, every line where it is there.

    Those that need a GPU begin with "```python gpu".
    """
    lines, inside, kept = [], False, False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
            kept = inside and (line == "```python" or (line == "```python gpu" and with_gpu))
            line = ""
        lines.append(line if kept else "")
    return "\n".join(lines).rstrip()


PROGRAMS = [path for path in DOCUMENTS if program(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS, ids=lambda path: path.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = program(page.read_text(), with_gpu=has_gpu())
    for framework in FRAMEWORKS:
        if re.search(rf"^(import|from) ({framework}|twinfuse\.{framework})\b", code, re.M):
            require(framework)
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, **GROUP, "OMP_NUM_THREADS": "1", "TWINFUSE_STRICT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    # Lines have the numbers that they have in the page.
    assert done.returncode == 0, f"{page.relative_to(ROOT)}:\n{done.stdout}"


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def test_a_program_is_the_blocks_of_python_where_they_are() -> None:
    text = "a\n```python\nx = 1\n```\nb\n```\nno\n```\n```python gpu\ny = x\n```\n"
    assert program(text) == "\n\nx = 1"
    assert program(text, with_gpu=True) == "\n\nx = 1\n\n\n\n\n\n\ny = x"
    assert {"README.md", "usage.md"} < {path.name for path in PROGRAMS}


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}: there is no such file"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page.name}: {target}: no such heading"
