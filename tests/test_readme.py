"""Every command in the README is run, in the order of the page, in a directory of its own; the files it names exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.demo import DemoConfig
from dsv2.serve.process import await_server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sizes at which every stage of the demo does something; tests/test_demo.py shows what larger ones learn.
DEMO = dataclasses.replace(
    DemoConfig.quick(), english_bytes=200_000, chinese_bytes=50_000, code_bytes=100_000, batch_sequences=1, steps=2
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A newcomer's directory: the recipes, some text, and a hub that serves a small model under the official name."""
    directory = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "recipes", directory / "recipes")
    small = directory / "recipes" / "small.toml"
    text = small.read_text(encoding="utf-8")
    assert "batch_sequences = 8" in text
    small.write_text(text.replace("batch_sequences = 8", "batch_sequences = 1"), encoding="utf-8")  # as many steps
    (directory / "my_text").mkdir()
    for i in range(40):
        sentences = [
            f"The {(i * j) % 97}th day of the {j % 13}th month was {'dry' if j % 3 else 'wet'}.\n" for j in range(90)
        ]
        (directory / "my_text" / f"{i}.txt").write_text("".join(sentences), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(cli, "stop_on_signal", lambda: lambda: False)
        patch.setattr(DemoConfig, "quick", lambda: DEMO)
        patch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "runs/small/checkpoints/step-00000200")
        yield directory


def run_dsv2(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class Running:
    """A server, as in another terminal, from the time it answers."""

    def __init__(self, workdir: Path, arguments: list[str]) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "dsv2", *arguments], cwd=workdir)
        await_server(f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}", self.process)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0


def test_every_command_runs(workdir, request):
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            planned = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
            assert {"demo": "-m dsv2 demo --out demo", "test": "-m pytest"}[words[1]] in planned.stdout
        elif words[0] == ".":
            (venv,) = re.findall(r"^VENV := (.+)$", (ROOT / "Makefile").read_text(), re.M)
            assert words[1] == f"{venv}/bin/activate"
        elif words[1] == "serve":
            server = Running(workdir, words[1:])
            request.addfinalizer(server.stop)
        else:
            assert words[0] == "dsv2", command
            quick = ["--quick"] if words[1] == "demo" and "--list" not in words else []
            run_dsv2(words[1:] + quick)
    assert (workdir / "demo" / "report.html").is_file()
    assert (workdir / "runs" / "small" / "report.html").is_file()


def test_the_python_example_runs(workdir):
    if not (workdir / "runs" / "small").exists():
        pytest.skip("needs the model that the commands make")
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (5, 2048)
    assert (workdir / "copy" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:dsv2|tests|recipes)/[\w/.]+)`", README))))
def test_every_file_that_the_text_names_exists(path):
    assert (ROOT / path).exists()


def test_the_file_tree_is_complete():
    (tree,) = [block for block in README.split("```")[1::2] if block.startswith("\nMakefile")]
    listed = set(re.findall(r"([\w]+\.py)", tree))
    present = {p.name for p in (ROOT / "dsv2").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert listed == present


def test_the_readme_has_at_most_200_lines():
    assert README.count("\n") <= 200
