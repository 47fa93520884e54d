"""`dsv2 chat`: what becomes of lines, what the model is told, and how answers are stopped."""

from __future__ import annotations

import builtins
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.engine.core import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.terminal import COMMANDS, NO_TEMPLATE, Chat, Terminal, _typed_lines
from dsv2.text import DEEPSEEK_V2, DEEPSEEK_V2_5, encode_chat
from dsv2.weights import save
from tests.adapted import write_adapter
from tests.serve.live import get_model, get_tokenizer, new_engine

GREEDY = SamplingParams(temperature=0, max_tokens=6)
WARM = SamplingParams(temperature=1, max_tokens=6, seed=5)


class Session:
    """A chat in a terminal, what it showed, and what the engine was asked."""

    def __init__(self, params: SamplingParams = GREEDY, template: str | None = DEEPSEEK_V2, **changes: Any) -> None:
        self.engine = new_engine(**changes)
        self.prompts: list[list[int]] = []
        self.seeds: list[int | None] = []
        self.texts: list[str] = []
        self.notes: list[str] = []
        self._add, self.engine.add = self.engine.add, self.add
        self.chat = Chat(self.engine, params, template)

    def add(self, prompt: Any, params: SamplingParams, request_id: str | None = None) -> Any:
        request = self._add(prompt, params, request_id)
        self.prompts.append(list(prompt))
        self.seeds.append(params.seed)
        return request

    def run(self, *lines: str, is_interactive: bool = False, write: Callable[[str], None] | None = None) -> str:
        terminal = Terminal(self.chat, write or self.texts.append, self.notes.append, is_interactive=is_interactive)
        terminal.run(lines)
        return "".join(self.texts)


def prompt_of(*contents: str, system: str = "", template: str = DEEPSEEK_V2) -> list[int]:
    """Of a question, an answer, and so on."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return encode_chat(get_tokenizer(), messages, template=template)


def answers_to(chat: Chat, *questions: str) -> list[str]:
    return ["".join(chat.ask(question)) for question in questions]


# Conversations ----------------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_llm_says() -> None:
    llm = LLM(get_model(), get_tokenizer(), max_model_len=256)
    (output,) = llm.chat([{"role": "user", "content": "hello"}], GREEDY, template=DEEPSEEK_V2)
    assert answers_to(Session().chat, "hello") == [output.outputs[0].text.lstrip()]
    assert output.outputs[0].text.strip()


def test_the_space_that_a_template_leaves_to_the_model_is_not_part_of_an_answer() -> None:
    (space,) = get_tokenizer().encode(" ")
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={space: 100.0})
    assert answers_to(Session(params).chat, "one") == [""]
    assert answers_to(Session(params, template=None).chat, "one") == ["   "]


def test_the_model_is_told_what_was_said_before() -> None:
    session = Session()
    first, second = answers_to(session.chat, "one", "two")
    "".join(session.chat.ask("three"))
    assert session.prompts[1] == prompt_of("one", first.rstrip(), "two")
    assert session.prompts[2] == prompt_of("one", first.rstrip(), "two", second.rstrip(), "three")


def test_a_retry_takes_the_place_of_the_last_answer_and_is_drawn_anew() -> None:
    session = Session(WARM)
    first, _ = answers_to(session.chat, "one", "two")
    again = "".join(session.chat.retry())
    "".join(session.chat.ask("three"))
    assert session.prompts[2] == session.prompts[1]
    assert session.prompts[3] == prompt_of("one", first.rstrip(), "two", again.rstrip(), "three")
    assert session.seeds == [5, 6, 7, 8]


def test_the_same_seed_gives_the_same_conversation() -> None:
    conversations = [answers_to(Session(WARM).chat, "one", "two") for _ in range(2)]
    assert conversations[0] == conversations[1]


def test_without_a_seed_conversations_differ_in_theirs() -> None:
    sessions = [Session(GREEDY), Session(GREEDY)]
    for session in sessions:
        answers_to(session.chat, "one")
    assert sessions[0].seeds != sessions[1].seeds


def test_a_system_message_comes_first_and_stays_after_a_reset() -> None:
    session = Session()
    session.run("one", "/system  Be brief. ", "/reset", "two", "/system", "/reset", "three")
    assert session.prompts[1:] == [prompt_of("two", system="Be brief."), prompt_of("three")]


def test_without_a_template_each_line_is_continued_by_itself() -> None:
    session = Session(template=None)
    session.run("The quick", "brown fox", "/retry")
    assert session.prompts == [get_tokenizer().encode(text, add_bos=True) for text in ("The quick", *["brown fox"] * 2)]
    assert session.notes == [NO_TEMPLATE]


def test_the_tokenizers_own_template_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_tokenizer(), "chat_template", DEEPSEEK_V2_5)
    session = Session(template=None)
    session.run("one")
    assert session.prompts == [prompt_of("one", template=DEEPSEEK_V2_5)]
    assert session.notes == []


def test_a_conversation_that_is_too_long_is_refused_and_not_remembered() -> None:
    session = Session()
    (first,) = answers_to(session.chat, "one")
    with pytest.raises(ValueError, match="leaves no room for output"):
        answers_to(session.chat, "word " * 300)
    answers_to(session.chat, "two")
    assert session.prompts[1] == prompt_of("one", first.rstrip(), "two")


# Lines ------------------------------------------------------------------------------------------------------------


def test_answers_and_nothing_else_are_written_a_line_each() -> None:
    session = Session()
    expected = answers_to(Session().chat, "one", "two")
    assert session.run("one\n", "\n", "  two \n") == "".join(f"{answer}\n" for answer in expected)
    assert session.notes == []


def test_quit_ends_before_the_lines_do() -> None:
    session = Session()
    session.run("/quit", "one")
    assert session.prompts == []


MISTAKES = {
    "unknown command": ("/quite", f"no command /quite: {COMMANDS}"),
    "nothing to retry": ("/retry", "/retry has nothing to ask again"),
    "refused by the template": ("one", "chat template failed: TemplateError: not today"),
}
REFUSING = "{{ raise_exception('not today') }}"


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_pipe_ends_the_chat(what: str) -> None:
    line, message = MISTAKES[what]
    with pytest.raises(ValueError) as error:
        Session(template=REFUSING).run(line)
    assert str(error.value) == message


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_terminal_is_told_and_the_chat_goes_on(what: str) -> None:
    line, message = MISTAKES[what]
    session = Session(template=REFUSING)
    session.run(line, "/nonsense", is_interactive=True)
    assert session.notes == [f"error: {message}", f"error: no command /nonsense: {COMMANDS}"]


def test_a_system_message_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="/system has no effect"):
        Session(template=None).run("/system Be brief.")


# Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _handler() -> Iterator[None]:
    """Python's own handler, which a process in the background has not; it is there again afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press_ctrl_c_after(num_texts: int, texts: list[str]) -> Callable[[str], None]:
    def write(text: str) -> None:
        texts.append(text)
        if len(texts) == num_texts:
            signal.raise_signal(signal.SIGINT)

    return write


@pytest.mark.usefixtures("_handler")
def test_ctrl_c_stops_an_answer_in_a_terminal_and_the_chat_goes_on() -> None:
    session, texts = Session(SamplingParams(temperature=0, max_tokens=60)), []
    session.run("one", "two", is_interactive=True, write=press_ctrl_c_after(3, texts))
    shown = "".join(texts[:3])
    assert texts[3] == "\n"
    assert session.prompts == [prompt_of("one"), prompt_of("one", shown.rstrip(), "two")]
    assert len(texts) > 6


@pytest.mark.usefixtures("_handler")
def test_ctrl_c_ends_a_chat_in_a_pipe() -> None:
    session, texts = Session(SamplingParams(temperature=0, max_tokens=60)), []
    with pytest.raises(KeyboardInterrupt):
        session.run("one", "two", write=press_ctrl_c_after(3, texts))
    assert len(texts) == 3


def test_an_answer_that_is_stopped_leaves_nothing_in_the_engine() -> None:
    engine: Engine = new_engine(enable_prefix_caching=False)
    answer = Chat(engine, SamplingParams(temperature=0, max_tokens=60), DEEPSEEK_V2).ask("one")
    next(answer)
    answer.close()
    while engine.has_unfinished:
        assert engine.step() == []
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


def test_at_the_prompt_ctrl_c_begins_a_new_line_and_ctrl_d_ends(monkeypatch, capsys) -> None:
    keys: Iterator[str | BaseException] = iter(["one", KeyboardInterrupt(), "two", EOFError()])

    def typed(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(builtins, "input", typed)
    assert list(_typed_lines()) == ["one", "", "two"]
    assert capsys.readouterr().out == "\n\n"


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    save(get_model(), path, tokenizer=get_tokenizer())
    return path


def dsv2(lines: str, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["chat", *arguments], input=lines, catch_exceptions=False)


OPTIONS = ["--temperature", "0", "--max-tokens", "6", "--device", "cpu"]


def test_the_command_takes_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    adapter = str(write_adapter(tmp_path / "adapter", get_model()))
    llm = LLM(str(checkpoint), device="cpu", adapter=adapter)
    (output,) = llm.chat([{"role": "user", "content": "one"}], GREEDY, template=DEEPSEEK_V2)
    done = dsv2("one\n", str(checkpoint), *OPTIONS, "--template", "v2", "--adapter", adapter)
    assert done.stdout == f"{output.outputs[0].text.lstrip()}\n"
    assert done.stdout != dsv2("one\n", str(checkpoint), *OPTIONS, "--template", "v2").stdout


def test_the_command_answers_the_lines_of_a_pipe(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(DEEPSEEK_V2)
    expected = "".join(f"{answer}\n" for answer in answers_to(Session().chat, "one", "two"))
    for template in ("v2", str(tmp_path / "own.jinja")):
        done = dsv2("one\ntwo\n", str(checkpoint), *OPTIONS, "--template", template)
        assert (done.exit_code, done.stdout, done.stderr) == (0, expected, "")


def test_the_command_says_on_stderr_that_there_is_no_template(checkpoint: Path) -> None:
    done = dsv2("", str(checkpoint), *OPTIONS)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"{NO_TEMPLATE}\n")


def test_a_template_that_is_not_there_is_told(checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jinja"):
        dsv2("one\n", str(checkpoint), "--template", "none.jinja")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save(get_model(), tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        dsv2("one\n", str(tmp_path / "bare"), *OPTIONS)


def test_sampling_out_of_range_is_refused_before_the_model_is_read() -> None:
    with pytest.raises(ValueError, match="top_p=2"):
        dsv2("", "nowhere", "--top-p", "2")
