"""Saving on a full disk, or in a process that dies: the previous checkpoint stays whole, and no rubbish stays."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2 import files, weights
from tests.numerics import mla_config, random_model


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint with nothing beside it."""
    weights.save(random_model(mla_config()), tmp_path / "model")
    return tmp_path / "model"


def is_model(directory: Path, seed: int) -> bool:
    """Whether the directory holds the random model of that seed, whole."""
    loaded, expected = weights.load(directory), random_model(mla_config(), seed)
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


# Full disks -------------------------------------------------------------------------------------------------------


def fail_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the disk is full at its n-th call."""
    calls = iter(range(1, 10**6))

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    return fails


@pytest.mark.parametrize(
    ("function", "call"), [("save_file", 1), ("save_file", 3), ("write_json", 1), ("write_json", 2)]
)
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_rubbish(
    function: str, call: int, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, function, fail_at(call, getattr(weights, function)))
    with pytest.raises(OSError, match="No space left on device"):
        weights.save(random_model(mla_config(), seed=1), whole, max_shard_bytes=100_000)
    assert [f.name for f in whole.parent.iterdir()] == ["model"]
    assert is_model(whole, seed=0)


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "save_file", fail_at(2, weights.save_file))
    with pytest.raises(OSError, match="No space left on device"):
        weights.save(random_model(mla_config()), tmp_path / "model", max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_fails_puts_the_previous_checkpoint_back(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files, "_swap", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        weights.save(random_model(mla_config(), seed=1), whole)
    assert [f.name for f in whole.parent.iterdir()] == ["model"]
    assert is_model(whole, seed=0)


def test_a_replacement_in_two_steps_leaves_no_rubbish(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swap", lambda a, b: False)
    weights.save(random_model(mla_config(), seed=1), whole)
    assert [f.name for f in whole.parent.iterdir()] == ["model"]
    assert is_model(whole, seed=1)


# Both run in a process of their own: one limits the size of every file, the other dies at each step in turn.

FILE_LIMIT_SCRIPT = """
import resource, signal, sys
from dsv2 import weights
from tests.numerics import mla_config, random_model

model = random_model(mla_config(), seed=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    weights.save(model, sys.argv[1])
except OSError as error:
    sys.exit(f"OSError: {error}")
"""

SUDDEN_DEATH_SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
from dsv2 import weights
from tests.numerics import mla_config, random_model

previous, target = Path(sys.argv[1]), Path(sys.argv[2])
model = random_model(mla_config(), seed=1)
write, steps, last = weights.save_file, 0, 0
watched = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "step")

def save_file(*args, **kwargs):
    write(*args, **kwargs)
    sys.audit("step", str(target))

def die_at_the_last_step(event, args):
    global steps
    if event in watched and any(target.name in str(a) or str(a).endswith((".json", ".safetensors")) for a in args):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

weights.save_file = save_file
died = True
while died:
    last += 1
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(previous, target)
    child = os.fork()
    if child == 0:
        sys.addaudithook(die_at_the_last_step)
        weights.save(model, target, max_shard_bytes=200_000)
        os._exit(0)
    died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = list(weights.load(target).parameters())
    print(*[s for s in (0, 1) if all(a.equal(b) for a, b in zip(found, random_model(mla_config(), s).parameters()))])
"""


def run(script: str, *arguments: Path) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=root, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint_and_no_rubbish(whole: Path) -> None:
    done = run(FILE_LIMIT_SCRIPT, whole)
    assert done.returncode == 1, done.stderr
    assert "OSError: cannot write" in done.stderr
    assert "model.safetensors: " in done.stderr
    assert [f.name for f in whole.parent.iterdir()] == ["model"]
    assert is_model(whole, seed=0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that swaps two paths in one step")
def test_a_process_killed_at_any_step_of_saving_leaves_a_whole_checkpoint(whole: Path) -> None:
    done = run(SUDDEN_DEATH_SCRIPT, whole, whole.parent / "place" / "model")
    assert done.returncode == 0, done.stderr
    seeds = done.stdout.split()
    # The old one until some step, from then on the new one; the last run is not interrupted.
    assert seeds == sorted(seeds)
    assert seeds.count("0") > 10
    assert seeds.count("1") > 1
