"""`dsv2 chat`: a conversation with a model in a terminal, or with the lines of a pipe; answers appear as they come.

Turns lines into prompts and shows what the engine says to them. Knows no HTTP: clients of a server talk to `serve`.
"""

from __future__ import annotations

import importlib
import secrets
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from dsv2.config.schema import require
from dsv2.engine.core import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.sampling import SamplingParams
from dsv2.text import DEEPSEEK_V2, DEEPSEEK_V2_5, encode_chat

COMMANDS = "/reset forgets the conversation, /system TEXT instructs, /retry asks again, /quit or Ctrl-D ends"
NO_TEMPLATE = "the tokenizer has no chat template, so the model continues each line by itself (see --template)"

_TEMPLATES = {"v2": DEEPSEEK_V2, "v2.5": DEEPSEEK_V2_5}

Pieces = Generator[str, None, None]


class Chat:
    """What was said, and the model's answers to it.

    Args:
        params: of every answer. Answers differ in their seeds, which follow from `params.seed`; None: a random one.
        template: jinja text; None: the tokenizer's own. Where there is neither, nothing is remembered and the model
            continues each question.

    Raises ValueError for an engine without a tokenizer.
    """

    def __init__(self, engine: Engine, params: SamplingParams, template: str | None = None) -> None:
        if engine.tokenizer is None:
            raise ValueError("chat needs a tokenizer: the checkpoint has no tokenizer.json")
        self._engine, self._tokenizer, self._params = engine, engine.tokenizer, params
        self._template = engine.tokenizer.chat_template if template is None else template
        self._seed = secrets.randbits(62) if params.seed is None else params.seed
        self._num_answers = 0
        self._system = ""
        self._turns: list[tuple[str, str]] = []

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns = []

    def instruct(self, system: str) -> None:
        """Set the system message, which is said before everything else; "" for none."""
        require(self.has_template, f"/system has no effect: {NO_TEMPLATE}")
        self._system = system

    def ask(self, question: str) -> Pieces:
        """The answer as it comes, "" where a step of the engine brought no text.

        Whoever closes the generator stops the answer; what came until then is remembered. Raises ValueError, with
        nothing remembered, for a conversation that is too long, and for what the template refuses.
        """
        return self._answer(self._turns, question)

    def retry(self) -> Pieces:
        """Another answer in place of the last, as `ask`. Raises ValueError where nothing was asked."""
        require(bool(self._turns), "/retry has nothing to ask again")
        return self._answer(self._turns[:-1], self._turns[-1][0])

    def _answer(self, turns: list[tuple[str, str]], question: str) -> Pieces:
        seed = (self._seed + self._num_answers) % 2**63
        request = self._engine.add(self._prompt(turns, question), replace(self._params, seed=seed))
        self._num_answers += 1
        answer, is_finished = "", False
        try:
            while not is_finished:
                deltas = [delta for delta in self._engine.step() if delta.request_id == request.id]
                is_finished = any(delta.finish_reason for delta in deltas)
                text = "".join(delta.text for delta in deltas)
                if self.has_template and not answer:
                    text = text.lstrip()  # V2's template ends before the space that the model says first
                answer += text
                yield text
        finally:
            self._engine.abort(request.id)
            self._turns = [*turns, (question, answer.rstrip())]

    def _prompt(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(question, add_bos=True)
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        return encode_chat(self._tokenizer, messages, template=self._template)


class Terminal:
    """Reads lines, shows answers. In an interactive one mistakes are told and Ctrl-C stops an answer; else both end it.

    Answers go to `write`, everything else to `note`.
    """

    def __init__(
        self, chat: Chat, write: Callable[[str], None], note: Callable[[str], None], *, is_interactive: bool
    ) -> None:
        self._chat, self._write, self._note, self._is_interactive = chat, write, note, is_interactive

    def run(self, lines: Iterable[str]) -> None:
        """Until /quit or the last line. Raises ValueError as `Chat` does, and for unknown commands."""
        if not self._chat.has_template:
            self._note(NO_TEMPLATE)
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            with self._telling() if self._is_interactive else nullcontext():
                self._take(line)

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self._chat.reset()
        elif command == "/system":
            self._chat.instruct(rest.strip())
        elif command == "/retry":
            self._show(self._chat.retry())
        elif command.startswith("/"):
            raise ValueError(f"no command {command}: {COMMANDS}")
        elif line:
            self._show(self._chat.ask(line))

    def _show(self, answer: Pieces) -> None:
        with closing(answer), _interrupts() if self._is_interactive else nullcontext(lambda: False) as is_interrupted:
            for text in answer:
                self._write(text)
                if is_interrupted():
                    break
            self._write("\n")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self._note(f"error: {error}")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """In this context Ctrl-C, instead of breaking into the engine's work, makes the function given return True."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def chat(
    path: str, params: SamplingParams, *, template: str | None, device: str, dtype: str | None, adapter: str | None
) -> None:
    """Chat with a checkpoint (a directory or hub id) over standard input and output, until either ends.

    Args:
        params: see `Chat`.
        template: v2, v2.5 or a file of jinja; None: the tokenizer's own.
        device, dtype, adapter: see `LLM`; the device "auto" is a GPU where there is one.

    Raises ValueError as `LLM`, `Chat` and, where standard input is no terminal, `Terminal.run` do.
    """
    text = None if template is None else _TEMPLATES.get(template) or Path(template).read_text(encoding="utf-8")
    is_interactive = sys.stdin.isatty()
    engine = LLM(path, device=device, dtype=dtype, max_num_seqs=1, adapter=adapter).engine
    terminal = Terminal(Chat(engine, params, text), _write, _note, is_interactive=is_interactive)
    if is_interactive:
        _note(COMMANDS)
    terminal.run(_typed_lines() if is_interactive else sys.stdin)


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        importlib.import_module("readline")  # from now on lines can be edited and called up again
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            line = ""
            _write("\n")
        except EOFError:
            _write("\n")
            return
        yield line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
