"""The `dsv2` command as a person types it: output, exit status, one line for every mistake."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import dsv2
from dsv2 import cli
from dsv2.config.run import to_toml
from tests.numerics import random_model
from tests.train.tiny import recipe, write_corpus


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dsv2 ...` in this process, which spares each test two seconds of imports."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dsv2", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    status = exit_.value.code
    assert status is None or isinstance(status, int)
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


def run_as_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "dsv2", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder)
    (folder / "recipe.toml").write_text(to_toml(recipe(folder, steps=2).to_dict()), encoding="utf-8")
    model = random_model(recipe(folder).model)
    dsv2.save(model, folder / "model", dsv2.Tokenizer.load(folder / "tokenizer"))
    return folder


@pytest.mark.parametrize(
    ("preset", "parameters", "kv"), [("v2", 235_741_434_880, 34_560), ("v2-lite", 15_706_484_224, 15_552)]
)
def test_describe_gives_the_published_sizes_as_json(preset, parameters, kv):
    out = json.loads(run("describe", preset, "--json", "--modules").stdout)
    assert (out["parameters"], out["kv_elements_per_token"], out["kv_bytes_per_token"]) == (parameters, kv, 2 * kv)
    assert sum(row["parameters"] for row in out["modules"]) == parameters
    assert out["flops_per_token"] > 6 * out["active_parameters_without_embedding"]


def test_describe_reads_a_checkpoint(corpus):
    out = json.loads(run("describe", str(corpus / "model"), "--json").stdout)
    assert out["parameters"] == sum(p.numel() for p in dsv2.load(corpus / "model").parameters())


def test_describe_prints_a_table_for_people():
    text = run("describe", "v2", "--modules").stdout
    assert "235,741,434,880" in text
    assert "kv_a_proj_with_mqa.weight" in text


def test_demo_lists_its_stages():
    assert [line.split()[0] for line in run("demo", "--list").stdout.splitlines()] == [
        *("text", "tokenizer", "shards", "pretrain", "evaluate", "generate", "report")
    ]


def test_a_recipe_trains_and_the_result_generates(corpus, tmp_path):
    trained = run("pretrain", str(corpus / "recipe.toml"), "--out", str(tmp_path / "run"), "--set", "train.seed=3")
    assert trained.returncode == 0, trained.stderr
    assert "seed = 3" in (tmp_path / "run" / "config.toml").read_text()
    assert (tmp_path / "run" / "report.html").is_file()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    said = run("generate", checkpoint, "--prompt", "hello", "--max-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("hello")


def test_convert_rewrites_dtype_and_keeps_the_tokenizer(corpus, tmp_path):
    done = run("convert", str(corpus / "model"), str(tmp_path / "half"), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert str(dsv2.load(tmp_path / "half").dtype) == "torch.bfloat16"
    assert dsv2.Tokenizer.load(tmp_path / "half").fingerprint == dsv2.Tokenizer.load(corpus / "tokenizer").fingerprint


MISTAKES = {
    "unknown preset": (["describe", "v2-light"], "did you mean 'v2-lite'"),
    "no such checkpoint": (["describe", "no/such"], "no checkpoint at no/such"),
    "missing recipe": (["pretrain", "nowhere.toml", "--out", "{tmp}/r"], "no recipe at nowhere.toml"),
    "misspelt key": (["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "train.lr_peek=1"], "'lr_peak'"),
    "missing data": (["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "data.train={tmp}/no"], "{tmp}/no"),
    "override without value": (
        ["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "x"],
        "section.key=value",
    ),
    "empty prompt": (["generate", "{c}/model", "--prompt", ""], "--prompt is empty"),
    "bad temperature": (["generate", "{c}/model", "--prompt", "a", "--temperature", "nan"], "temperature=nan"),
    "unknown dtype": (["generate", "{c}/model", "--prompt", "a", "--dtype", "int3"], "dtype 'int3'"),
    "unknown device": (["generate", "{c}/model", "--prompt", "a", "--device", "toaster"], "device 'toaster'"),
    "missing text": (["data", "tokenizer", "{tmp}/none", "--out", "{tmp}/t"], "{tmp}/none"),
    "report of nothing": (["report", "{tmp}"], "holds no training metrics"),
    "convert onto something else": (["convert", "{c}/model", "{c}"], "may not be replaced"),
    "held out into the training text": (
        [
            "data",
            "shards",
            "{c}/recipe.toml",
            "--tokenizer",
            "{c}/tokenizer",
            "--out",
            "{tmp}/r",
            "--held-out",
            "{tmp}/r",
        ],
        "must be another directory than --out",
    ),
    "unknown stage": (["demo", "--out", "{tmp}/d", "--stage", "train"], "no stage 'train'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(corpus, tmp_path, name):
    arguments, message = MISTAKES[name]
    fill = {"c": str(corpus), "tmp": str(tmp_path)}
    result = run(*(a.format(**fill) for a in arguments))
    assert result.returncode == 2
    assert message.format(**fill) in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()
