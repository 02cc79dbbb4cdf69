"""Shared by the tests: running a script as its user would, but in this process."""

import importlib
import os
import re
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings

import pytest  # noqa: E402
import torch  # noqa: E402

from crate.cli import run  # noqa: E402
from crate.data import decode, load_data  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh():
    """Every test draws the same numbers, alone or among others. Data sets are loaded once a process; tests that change their
    files need them loaded again.
    """
    torch.manual_seed(11)
    yield
    load_data.cache_clear()
    decode.cache_clear()


def pytest_configure(config):
    if not re.search(r"(?<!not )\bcuda", config.option.markexpr):  # without -m cuda, tests mean the CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA here, or hidden: run with -m cuda")


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train", "--model", ...) -> (exit code, stdout, stderr), in this process."""

    def call(name, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(importlib.import_module(name).main)
        output = capsys.readouterr()
        return stop.value.code or 0, output.out, output.err

    return call


def assert_refused(outcome, *words):
    """Exit code 2 and one line on stderr (after progress bars, if any) that holds all `words`; no usage, no traceback."""
    code, _, error = outcome
    assert code == 2 and "Traceback" not in error and "usage:" not in error, error
    line = error.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: " in line
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"
