"""Shared by the tests: running a script as its user would, but in this process, and small training configs."""

import importlib
import sys

import pytest
import torch

from crate.cli import run
from crate.data import load_data

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def fresh_data():
    """Data sets are loaded once a process; tests that change their files need them loaded again."""
    yield
    load_data.cache_clear()


def run_script(monkeypatch, name, *arguments):
    """The exit code of a script, run in this process on one thread."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run(importlib.import_module(name).main)
    return stop.value.code or 0


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train", "--model", ...) -> (exit code, stdout, stderr)."""

    def call(name, *arguments):
        capsys.readouterr()
        code = run_script(monkeypatch, name, *arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def assert_refused(outcome, *words):
    """Exit code 2 and one line on stderr (after progress bars, if any) that holds all `words`; no usage, no traceback."""
    code, _, error = outcome
    assert code == 2
    assert "Traceback" not in error and "usage:" not in error
    line = error.strip().splitlines()[-1]
    assert "error: " in line
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"
