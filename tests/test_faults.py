"""Whatever happens to a run, nothing is lost and nothing changes: kills, signals, full disks, broken files.

    python -m pytest -m faults      prints a table: fault, tries, outcome

Every resumed run is compared with one that nothing happened to: log.jsonl (times aside), final weights, result.json.
"""

import io
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from crate.cli import InputError
from crate.files import load_checkpoint, read_json, write_json
from crate.model import VARIANTS
from crate.runs import FREE_TO_CHANGE, load_run, lock_holder, read_log, state
from tests import processes
from tests.conftest import assert_refused
from tests.processes import ROOT, SMALL, SRR, Train, all_ended, children, command, outcome, wait_until

pytestmark = pytest.mark.faults

RUNS = {name: ("--model", name, *SRR, "--epochs", 8) for name in VARIANTS}
RUNS |= {
    "fp16": ("--amp", "fp16", "--clip-norm", 1.0, *SRR, "--epochs", 6),
    "augmented": ("--augment", "basic", "--dropout", 0.1, "--epochs", 4),
    "until the loss is low": ("--stop-at-loss", 1.5, "--schedule", "constant", "--lr", 1e-2, *SRR, "--epochs", 60),
}
ENDLESS = ("--epochs", 10**6, "--log-srr-every", 0, "--validate-every", 10**6)


def slow_but(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(*flags) -> outcome of the run that nothing happens to, and the seconds it takes."""
    known = {}

    def get(*flags):
        if flags not in known:
            out, began = tmp_path_factory.mktemp("whole"), time.monotonic()
            code, text = Train(out, *flags).wait(120)
            assert code == 0, text
            known[flags] = outcome(out), time.monotonic() - began
        return known[flags]

    return get


def finish(out, flags, expected):
    """Start the run again, without any fault: it ends as if nothing had happened."""
    code, text = Train(out, *flags, output=out.with_suffix(".end")).wait(120)
    assert code == 0, text
    assert outcome(out) == expected


def assert_stopped(ended, number):
    """Exit code 130 or 143, and one line."""
    code, text = ended
    assert code == 128 + number and "Traceback" not in text, text
    assert text.splitlines()[-1] == f"train.py: stopped by {number.name}; run the same command again to go on"


# Kills and signals


@pytest.mark.parametrize("name", slow_but(("crate",), RUNS))
def test_killed_and_stopped_at_random(tmp_path, whole, name, faults):
    flags, draw = RUNS[name], random.Random(name)
    expected, seconds = whole(*flags)

    def epochs():  # of the old checkpoint or the new one
        return sum(load_checkpoint(path)["epoch"] for path in tmp_path.glob("*/last.pt"))

    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    while numbers:
        before, script, number = epochs(), Train(tmp_path, *flags), numbers[0]
        wait_until(lambda: list(tmp_path.glob("*/init.pt")))
        time.sleep(draw.uniform(0, 0.4) * seconds)
        script.kill(number)
        ended = script.wait(30)
        if ended[0] == 0:  # it was done too soon: once more from the beginning
            seconds /= 2
            shutil.rmtree(next(tmp_path.glob("*/")))
            continue
        del numbers[0]
        if number != signal.SIGKILL:
            assert_stopped(ended, number)
            own = list(
                tmp_path.glob(f"*/.*.{script.process.pid}.tmp")
            )  # of one that was killed before, some may still be there
            assert len(ended[1].splitlines()) <= 2 and not own + list(tmp_path.glob("*/error.txt"))
            rows = [len(read_log(path.parent)) - 1 for path in tmp_path.glob("*/log.jsonl")]
            assert before <= epochs() and sum(rows) - epochs() in (0, 1)  # at most the epoch that ran is lost
        assert ended[0] in (-number, 128 + number), ended[1]
        faults(f"{number.name} at a random moment", 1, f"exit code {ended[0]}; resumed, bit for bit the same")
    finish(tmp_path, flags, expected)


@pytest.mark.parametrize("point", slow_but(("half",), ("half", "before", "after")))
def test_killed_inside_each_write(tmp_path, whole, point, faults):
    flags = ("--epochs", 1, *SRR)
    expected, _ = whole(*flags)
    for write in range(1, 100):
        out = tmp_path / str(write)
        out.mkdir()
        code, text = Train(out, *flags, fault=(processes.kill_at_write, write, point)).wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        finish(out, flags, expected)
    assert write - 1 == 7  # config.json twice, init.pt, log.jsonl, last.pt, val_losses.npy, result.json
    faults("SIGKILL inside a write (half written, whole, renamed)", write - 1, "resumed, bit for bit the same")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_a_sweep_of_two_processes(tmp_path, number, faults):
    script = Train(tmp_path, *ENDLESS, "--seed", 0, 1, "--jobs", 2)
    wait_until(lambda: len(list(tmp_path.glob("*/last.pt"))) == 2)
    os.killpg(script.process.pid, number) if number == signal.SIGINT else script.kill(number)
    assert_stopped(script.wait(30), number)
    assert all_ended(tmp_path) and all(load_checkpoint(path)["epoch"] > 0 for path in tmp_path.glob("*/last.pt"))
    faults(f"{number.name} to a sweep of two processes", 1, "all ended, each with its last epoch saved")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_run_all(tmp_path, number, faults):
    for name in ("run_all.sh", "requirements.txt", "train.py", "crate"):
        (tmp_path / name).symlink_to(ROOT / name)
    settings = {"PYTHON": sys.executable, "PRESET": "laptop", "JOBS": "2"}
    with command(tmp_path, tmp_path / "text", "bash", tmp_path / "run_all.sh", "train", **settings) as shell:
        wait_until(lambda: len(list(tmp_path.glob("runs/laptop/*/*/init.pt"))) == 2)
        os.killpg(shell.pid, number) if number == signal.SIGINT else shell.send_signal(number)
        assert_stopped((shell.wait(30), (tmp_path / "text").read_text()), number)
    assert all_ended(tmp_path / "runs")
    faults(f"{number.name} to run_all.sh", 1, f"exit code {128 + number}, all processes ended")


# Several processes


def test_processes_share_a_sweep(tmp_path, whole, faults):
    flags = ("--epochs", 4, "--seed", *range(4))
    expected, _ = whole(*flags)
    scripts = [Train(tmp_path, *flags, output=tmp_path / f"text{i}") for i in range(2)]
    codes, texts = zip(*(script.wait() for script in scripts))
    assert codes == (0, 0) and all("train loss" in text for text in texts), texts
    assert outcome(tmp_path) == expected  # had two trained a run, its log would have rows twice
    faults("two processes on one sweep", 1, "each run is trained once; the same results")


def test_two_processes_on_one_run(tmp_path, whole, faults):
    flags = ("--epochs", 12, *SRR)
    expected, _ = whole(*flags)
    first = Train(tmp_path, *flags, output=tmp_path / "first")
    wait_until(lambda: list(tmp_path.glob("*/last.pt")))
    first.kill(signal.SIGSTOP)
    (folder,) = tmp_path.glob("*/")
    before, holder = {path: path.read_bytes() for path in folder.iterdir()}, f"process {first.process.pid}"
    code, text = Train(tmp_path, *flags, output=tmp_path / "second").wait()
    assert code == 0 and "another process works on it" in text and holder in text, text
    assert state(folder)[0] == "running" and holder in state(folder)[1]
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    first.kill()
    first.wait()
    assert state(folder)[0] == "unfinished"
    finish(tmp_path, flags, expected)  # the lock of the dead process is taken over
    faults("two processes on one run; the first killed", 2, "the second left it alone, the third took over")


@pytest.mark.slow
def test_jobs_give_the_results_of_one_process(tmp_path, whole, faults):
    flags = ("--epochs", 100, "--seed", *range(4), "--log-srr-every", 0, *SRR)
    expected, _ = whole(*flags)
    script = Train(tmp_path, *flags, "--jobs", 2)
    wait_until(lambda: sum(lock_holder(path.parent) is not None for path in tmp_path.glob("*/last.pt")) == 2)
    os.kill(children(script.process.pid)[0], signal.SIGKILL)
    code, text = script.wait(200)
    assert code != 0 and "Traceback" not in text, (code, text)  # for not all runs are finished
    finish(tmp_path, (*flags, "--jobs", 2), expected)
    faults("a process of --jobs 2 killed", 1, "an exit code other than 0; resumed, bit for bit the same")


# Faults that end in one line

REFUSED = {  # a fault, what the line says, and in the table: the fault and what it ends in
    "config.json": ((processes.limit_file_size, 800), "config.json: File too large", "disk full", "names the file"),
    "init.pt": ((processes.limit_file_size, 4000), "init.pt: File too large", "disk full", "names the file"),
    "last.pt": ((processes.limit_file_size, 40_000), "last.pt: File too large", "disk full", "names the file"),
    "NaN at once": ((processes.nan_in_batch, 1), "epoch 1, step 1", "NaN in a batch", "names epoch and step"),
    "NaN": ((processes.nan_in_batch, 8), "epoch 2, step 8", "NaN in a batch", "names epoch and step"),
    "read-only run": ((processes.give_up_privileges,), "_s0", "read-only folder", "names the folder"),
    "read-only out": ((processes.give_up_privileges,), "runs", "read-only folder", "names the folder"),
}


@pytest.mark.parametrize("flags", [SRR, pytest.param(("--amp", "fp16", "--dropout", 0.1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(("last.pt", "NaN", "read-only run"), REFUSED))
def test_refused_in_one_line_and_resumed(tmp_path, whole, name, flags, faults):
    flags, (fault, words, of, ending) = ("--epochs", 3, *flags), REFUSED[name]
    expected, _ = whole(*flags)
    out = closed = tmp_path / "runs"
    out.mkdir()
    if name == "read-only run":
        Train(out, *flags, output=tmp_path / "text", fault=(processes.kill_at_write, 5, "after")).wait()
        (closed,) = out.iterdir()
    closed.chmod(0o555 if "read-only" in name else 0o755)
    code, text = Train(out, *flags, output=tmp_path / "text", fault=fault).wait()
    closed.chmod(0o755)
    assert_refused((code, "", text), words)
    for folder in out.glob("*/error.txt"):
        assert words in folder.read_text() and state(folder.parent)[0] == "failed"
    finish(out, flags, expected)
    faults(of, 1, f"exit code 2, {ending}; resumed, bit for bit the same")


# Files


def content(path):
    """What a checkpoint holds, in a form that can be compared."""
    buffer = io.BytesIO()
    torch.save(load_checkpoint(path), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished run of seed 0 and one of seed 1."""
    out = tmp_path_factory.mktemp("finished")
    code, text = Train(out, "--epochs", 1, "--seed", 0, 1).wait()
    assert code == 0, text
    return out


def test_truncated_and_flipped_checkpoints(tmp_path, finished, faults):
    last = next(finished.glob("*_s0/last.pt"))
    right, draw, path, expected = last.read_bytes(), random.Random(0), tmp_path / "broken.pt", content(last)
    record = right.rindex(b"archive/data/0") - 46  # the zip archive's entry for a tensor: all of its bits, and 200 somewhere
    flips = [*range(8 * record, 8 * record + 368), *(draw.randrange(8 * len(right)) for _ in range(200))]
    broken = [(right[: draw.randrange(len(right))], "cut off anywhere") for _ in range(50)]
    broken += [
        ((int.from_bytes(right, "little") ^ (1 << bit)).to_bytes(len(right), "little"), "a bit flipped") for bit in flips
    ]
    for damaged, fault in broken:
        path.write_bytes(damaged)
        try:
            assert content(path) == expected and fault == "a bit flipped"
            faults(f"checkpoint: {fault}", 1, "in padding: the same content")
        except InputError as error:
            assert "broken.pt: damaged or not a checkpoint" in str(error)
            faults(f"checkpoint: {fault}", 1, "refused")


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_checkpoints(tmp_path, finished, script, faults):
    shutil.copytree(finished, tmp_path / "runs")
    (folder,), harm = tmp_path.glob("runs/*_s0"), tmp_path / "harm"
    (folder / "result.json").unlink()
    foreign = [b"", b"hello", *(next(finished.glob(name)).read_bytes() for name in ("*_s0/init.pt", "*_s1/last.pt"))]
    for value in (torch.zeros(3), {"weights": torch.zeros(3)}, Malicious(harm), {"model": {}, "config": Malicious(harm)}):
        for zipped in (True, False):
            torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            foreign.append(buffer.getvalue())
    for value in foreign:
        (folder / "last.pt").write_bytes(value)
        assert_refused(script("train", *SMALL, "--epochs", 1, "--out", tmp_path / "runs"), "last.pt")
        assert (folder / "last.pt").read_bytes() == value and "last.pt" in (folder / "error.txt").read_text()
        assert not harm.exists(), "a pickle was executed"
    faults("something else in the place of last.pt, malicious pickles among it", len(foreign), "refused, not executed")


def test_config_edited_by_hand(tmp_path, finished, script, faults):
    shutil.copytree(finished, tmp_path / "runs")
    (folder,) = tmp_path.glob("runs/*_s0")
    right, again = read_json(folder / "config.json"), ("train", *SMALL, "--epochs", 1, "--out", tmp_path / "runs")
    keys = sorted(right.keys() - FREE_TO_CHANGE)
    for key in keys:
        other = random.Random(key).choice([value for value in ("../../elsewhere", 7, None) if value != right[key]])
        write_json(folder / "config.json", right | {key: other})
        with pytest.raises(InputError, match=f"config.json|{key}"):
            load_run(folder)  # as measure.py does
        assert_refused(script(*again), "config.json", key)
    for text in ("", "{", "[1]", "[" * 100_000, "\0"):
        (folder / "config.json").write_text(text)
        assert_refused(script(*again), "config.json")
        assert state(folder)[0] == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing elsewhere
    faults("config.json edited by hand", len(keys) + 5, "refused, names the setting")


@pytest.mark.parametrize("flags", [("--epochs", 4, *SRR), ("--epochs", 4, "--amp", "fp16", "--dropout", 0.1)])
@pytest.mark.parametrize("step", slow_but((8,), (1, 8, 20)))
def test_nan_in_a_batch(tmp_path, whole, flags, step, faults):
    expected, _ = whole(*flags)
    code, text = Train(tmp_path, *flags, fault=(processes.nan_in_batch, step)).wait()
    assert_refused((code, "", text), f"epoch {(step + 4) // 5}, step {step}")
    word, remark = state(next(tmp_path.glob("*/")))
    assert word == "failed" and f"step {step}" in remark
    finish(tmp_path, flags, expected)
    faults("NaN in a batch", 1, "exit code 2, names epoch and step; goes on from the epoch before")
