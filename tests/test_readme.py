"""The README says what the code does, and its snippets print what it says."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```)?", README, re.S)
assert SNIPPETS and all(printed for _, printed in SNIPPETS)
NUMBER = r"-?\d+\.\d+"


@pytest.mark.parametrize("code, printed", SNIPPETS, ids=lambda text: str(text)[:20].strip())
def test_snippets_print_what_stands_below_them(code, printed):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {})
    assert re.sub(NUMBER, "", output.getvalue()) == re.sub(NUMBER, "", printed)
    actual, expected = (list(map(float, re.findall(NUMBER, text))) for text in (output.getvalue(), printed))
    assert actual == pytest.approx(expected, rel=2e-3)  # numbers may round otherwise on another machine


def test_equation_map():
    section = README.split("\n## The code beside the paper\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line] for line in lines[2:]]
    for paper, where, what in table:
        module = importlib.import_module(where.strip("`").removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`(\w+)`", what):
            assert hasattr(module, name), f"{paper}: {name} is not in {where}"
    for equation in range(1, 15):
        assert any(re.search(rf"Eqs?\. [\d, ]*\b{equation}\b", paper) for paper, _, _ in table), equation


def test_links():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", re.sub("```.*?```", "", README, flags=re.S)):
        assert (ROOT / target).exists(), target


def test_flags_that_the_readme_names_exist():
    help_texts = "".join(
        subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in ("train", "measure", "correlate", "attention_only")
    )
    elsewhere = {"--array", "--wrap", "--nproc-per-node"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - elsewhere:
        assert flag in help_texts, flag
