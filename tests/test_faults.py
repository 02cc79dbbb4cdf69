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
import zipfile

import pytest
import torch

from crate.cli import InputError
from crate.files import load_checkpoint, read_json, write_json
from crate.model import VARIANTS
from crate.runs import FREE_TO_CHANGE, lock_holder, read_log, read_run, state
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
TWO = ("--epochs", 2, *SRR)
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


def refused(ended, *words):
    assert_refused((ended[0], "", ended[1]), *words)


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
            assert len(ended[1].splitlines()) <= 2 and not list(tmp_path.glob("*/.*.tmp")) + list(tmp_path.glob("*/error.txt"))
            rows = [len(read_log(path.parent)) - 1 for path in tmp_path.glob("*/log.jsonl")]
            assert before <= epochs() and sum(rows) - epochs() in (0, 1)  # at most the epoch that ran is lost
        assert ended[0] in (-number, 128 + number), ended[1]
        faults(f"{number.name} at a random moment", 1, f"exit code {ended[0]}; resumed, bit for bit the same")
    finish(tmp_path, flags, expected)


@pytest.mark.parametrize("point", slow_but(("half",), ("half", "before", "after")))
def test_killed_inside_each_write(tmp_path, whole, point, faults):
    expected, _ = whole(*TWO)
    for write in range(1, 100):
        out = tmp_path / str(write)
        out.mkdir()
        code, text = Train(out, *TWO, fault=(processes.kill_at_write, write, point)).wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        finish(out, TWO, expected)
    assert write - 1 == 8  # config.json twice, init.pt, log.jsonl, last.pt twice, val_losses.npy, result.json
    faults("SIGKILL inside a write (half written, whole, renamed)", write - 1, "resumed, bit for bit the same")


@pytest.mark.parametrize("number", slow_but((signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)))
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
    flags = ("--epochs", 6, "--seed", *range(6))
    expected, _ = whole(*flags)
    scripts = [Train(tmp_path, *flags, output=tmp_path / f"text{i}") for i in range(3)]
    codes, texts = zip(*(script.wait() for script in scripts))
    assert codes == (0, 0, 0) and sum("train loss" in text for text in texts) > 1, texts
    assert outcome(tmp_path) == expected  # had two trained a run, its log would have rows twice
    faults("three processes on one sweep", 1, "each run is trained once; the same results")


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
@pytest.mark.parametrize("victim", [None, 0, 1])
def test_jobs_give_the_results_of_one_process(tmp_path, whole, faults, victim):
    flags = ("--epochs", 150, "--seed", *range(4), "--log-srr-every", 0, *SRR)
    expected, _ = whole(*flags)
    script = Train(tmp_path, *flags, "--jobs", 2)
    if victim is not None:
        wait_until(lambda: sum(lock_holder(path.parent) is not None for path in tmp_path.glob("*/last.pt")) == 2)
        os.kill([script.process.pid, *children(script.process.pid)][victim], signal.SIGKILL)
        code, text = script.wait(200)
        assert code != 0 and "Traceback" not in text, (code, text)  # for not all runs are finished
        wait_until(lambda: all_ended(tmp_path), 120)
        faults("a process of --jobs 2 killed", 1, "an exit code other than 0; resumed, bit for bit the same")
        script = Train(tmp_path, *flags, "--jobs", 2)
    code, text = script.wait(200)
    assert code == 0 and outcome(tmp_path) == expected, text


# The disk


@pytest.mark.parametrize("file", slow_but(("last.pt",), ("config.json", "init.pt", "last.pt")))
def test_disk_full(tmp_path, whole, file, faults):
    expected, _ = whole(*TWO)
    limit = {"config.json": 800, "init.pt": 4000, "last.pt": 40_000}[file]
    refused(Train(tmp_path, *TWO, fault=(processes.limit_file_size, limit)).wait(), f"{file}: File too large")
    finish(tmp_path, TWO, expected)
    faults("disk full (limit on a file's size)", 1, "exit code 2, names the file; goes on when there is room")


@pytest.mark.parametrize("what", slow_but(("run",), ("out", "run")))
def test_read_only_folder(tmp_path, whole, what, faults):
    expected, _ = whole(*TWO)
    out = closed = tmp_path / "runs"
    out.mkdir()
    if what == "run":
        Train(out, *TWO, output=tmp_path / "text", fault=(processes.kill_at_write, 5, "after")).wait()
        closed = next(out.iterdir())
    closed.chmod(0o555)
    ended = Train(out, *TWO, output=tmp_path / "text", fault=(processes.give_up_privileges,)).wait()
    closed.chmod(0o755)
    refused(ended, str(closed))
    finish(out, TWO, expected)
    faults("read-only folder", 1, "exit code 2, names the folder; goes on when it can be written")


# Files


def content(value):
    """A checkpoint in a form that can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: content(part) for key, part in value.items()}
    return [content(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished run of seed 0 and one of seed 1."""
    out = tmp_path_factory.mktemp("finished")
    code, text = Train(out, "--epochs", 1, "--seed", 0, 1).wait()
    assert code == 0, text
    return out


def test_truncated_and_flipped_checkpoints(tmp_path, finished, faults):
    last = next(finished.glob("*_s0/last.pt"))
    right, draw, path = last.read_bytes(), random.Random(0), tmp_path / "broken.pt"
    for _ in range(100):
        path.write_bytes(right[: draw.randrange(len(right))])
        with pytest.raises(InputError, match="broken.pt: damaged or not a checkpoint"):
            load_checkpoint(path)
    caught, expected = 0, content(load_checkpoint(last))
    record = right.rindex(b"archive/data/0") - 46  # the zip archive's entry for a tensor: all of its bits, and 500 somewhere
    flips = [*range(8 * record, 8 * record + 368), *(draw.randrange(8 * len(right)) for _ in range(500))]
    for bit in flips:
        flipped = bytearray(right)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert content(load_checkpoint(path)) == expected, bit  # a bit that nothing depends on, such as padding
        except InputError as error:
            assert "broken.pt: damaged or not a checkpoint" in str(error)
            caught += 1
    assert caught > 500 * sum(len(part[2]) for part in expected["model"].values()) / len(right)
    faults("checkpoint cut off anywhere", 100, "refused")
    faults("a bit of a checkpoint flipped", len(flips), f"{caught} refused, {len(flips) - caught} in padding: the same content")


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
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    foreign = [b"", b"hello", (tmp_path / "other.zip").read_bytes(), torch.zeros(3), {"weights": torch.zeros(3)}]
    foreign += [next(finished.glob(name)).read_bytes() for name in ("*_s0/init.pt", "*_s1/last.pt")]
    foreign += [Malicious(harm), {"model": {}, "config": Malicious(harm)}]
    for value in foreign:
        buffer = io.BytesIO(value if isinstance(value, bytes) else b"")
        if not isinstance(value, bytes):
            torch.save(value, buffer)
        (folder / "last.pt").write_bytes(buffer.getvalue())
        assert_refused(script("train", *SMALL, "--epochs", 1, "--out", tmp_path / "runs"), "last.pt")
        assert (folder / "last.pt").read_bytes() == buffer.getvalue()
        assert "last.pt" in (folder / "error.txt").read_text() and state(folder)[0] == "failed"
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
        with pytest.raises(InputError, match="config.json"):
            read_run(folder)  # as measure.py does
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
    refused(Train(tmp_path, *flags, fault=(processes.nan_in_batch, step)).wait(), f"epoch {(step + 4) // 5}, step {step}")
    word, remark = state(next(tmp_path.glob("*/")))
    assert word == "failed" and f"step {step}" in remark
    finish(tmp_path, flags, expected)
    faults("NaN in a batch", 1, "exit code 2, names epoch and step; goes on from the epoch before")
