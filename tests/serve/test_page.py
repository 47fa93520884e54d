"""The chat page as its reader meets it: in a real Chromium, before a server that answers as each test says."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import FakeServer, Page, Reply, browsing, faking, find_chromium

PAGE = Path(__file__).parents[2] / "dsv2" / "serve" / "page.html"
IS_IDLE = "!document.body.classList.contains('running')"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browsing(program) as browser:
        yield Page(browser)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with faking(PAGE.read_bytes()) as server:
        yield server


@pytest.fixture
def open_page(tab: Page, server: FakeServer) -> Iterator[Open]:
    """Opens the page, which must get through the test without an exception."""

    def open_page(**options: Any) -> Page:
        tab.open(server.url, **options)
        tab.wait_until("document.title === 'deepseek-v2-lite' || settings.open")
        return tab

    yield open_page
    assert tab.problems() == []


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


def ask(page: Page, text: str) -> None:
    page.type(text, into="#prompt")
    page.press("Enter")


def answer(page: Page, server: FakeServer, *pieces: str, question: str = "Hello") -> str:
    """The answer shown, once it is complete."""
    server.replies.append(Reply(list(pieces)))
    ask(page, question)
    page.wait_until(f"{IS_IDLE} && document.querySelector('.turn:last-child[data-state=done]')")
    return page.text(".turn:last-child .answer")


def button(name: str) -> str:
    """JavaScript that presses a button by its name, which must be shown."""
    shown = f"e.checkVisibility({{ visibilityProperty: true }}) && e.textContent === '{name}'"
    return f"[...document.querySelectorAll('button')].find((e) => {shown}).click()"


# Answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_shows_while_it_streams(page, server):
    more = threading.Event()
    server.replies.append(Reply(["Cold ", "mountain", more, " spring"]))
    ask(page, "Two words?")
    page.wait_until("document.querySelector('.answer').textContent === 'Cold mountain'")
    more.set()
    page.wait_until("document.querySelector('.answer').textContent === 'Cold mountain spring'")
    assert page.text(".question") == "Two words?"


def test_tokens_and_times_show_under_an_answer(page, server):
    more = threading.Event()
    server.replies.append(Reply(["one", more, " two", " three"]))
    ask(page, "Count")
    page.wait_until("document.querySelector('.answer').textContent === 'one'")
    more.set()
    page.wait_until(IS_IDLE)
    assert re.fullmatch(
        r"3 tokens · [\d.,]+ tokens/s · first token after \d+\.\d\d s · 12 in the prompt", page.text(".stats")
    )


def test_escape_aborts_the_request_and_keeps_the_text(page, server):
    reply = Reply(["so far", threading.Event()])
    server.replies.append(reply)
    ask(page, "Go on")
    page.wait_until("document.querySelector('.answer').textContent === 'so far'")
    page.press("Escape")
    assert reply.left.wait(10)
    page.wait_until(f"{IS_IDLE} && document.querySelector('.turn').dataset.state === 'stopped'")
    assert page.text(".answer") == "so far"


def test_the_send_button_stops_while_an_answer_streams(page, server):
    reply = Reply([threading.Event()])
    server.replies.append(reply)
    ask(page, "Go on")
    page.wait_until("document.querySelector('#go').ariaLabel === 'Stop'")
    page.click("#go")
    assert reply.left.wait(10)


def test_retry_replaces_the_answer(page, server):
    answer(page, server, "first")
    server.replies.append(Reply(["second"]))
    page.evaluate(button("Retry"))
    page.wait_until("document.querySelector('.answer').textContent === 'second'")
    assert server.requests[0][1] == server.requests[1][1]


def test_an_edited_question_replaces_the_turn(page, server):
    answer(page, server, "4", question="2 + 2?")
    page.evaluate(button("Edit"))
    assert page.evaluate("document.querySelector('#prompt').value") == "2 + 2?"
    assert answer(page, server, "6", question="3 + 3?") == "6"
    assert page.text(".question") == "3 + 3?"
    assert server.requests[1][1]["messages"] == [{"role": "user", "content": "3 + 3?"}]


def test_a_conversation_goes_along_with_the_next_question(page, server):
    answer(page, server, "Hi!", question="Hello")
    answer(page, server, "Bye!", question="Goodbye")
    said = [("user", "Hello"), ("assistant", "Hi!"), ("user", "Goodbye")]
    assert server.requests[1][1]["messages"] == [{"role": role, "content": content} for role, content in said]


def test_a_new_chat_forgets_the_conversation(page, server):
    answer(page, server, "Hi!")
    page.click("#new")
    answer(page, server, "Hi again!")
    assert [message["role"] for message in server.requests[1][1]["messages"]] == ["user"]


# Requests ---------------------------------------------------------------------------------------------------------


def test_the_system_prompt_and_the_controls_arrive(page, server):
    page.click("#open-settings")
    page.type("Be brief.", into="#system")
    for name, value in {"top_k": "40", "max_tokens": "64", "seed": "7", "stop": "END\n\\n\\n"}.items():
        page.type(value, into=f"[name={name}]")
    page.evaluate("document.querySelector('[name=temperature]').value = '0.25'")
    page.press("Escape")
    answer(page, server, "Yes.", question="Will you?")
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "deepseek-v2-lite",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Will you?"}],
        "temperature": 0.25,
        "top_p": 0.95,
        "top_k": 40,
        "max_tokens": 64,
        "seed": 7,
        "stop": ["END", "\n\n"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_reset_brings_the_controls_back(page, server):
    page.click("#open-settings")
    page.type("7", into="[name=max_tokens]")
    page.type("7", into="[name=seed]")
    page.click("#reset")
    page.press("Escape")
    answer(page, server, "Yes.")
    body = server.requests[0][1]
    assert (body["max_tokens"], "seed" in body) == (1024, False)


def test_a_control_out_of_range_is_shown_and_nothing_is_sent(page, server):
    page.evaluate("document.querySelector('[name=max_tokens]').value = '0'")
    ask(page, "Hello")
    page.wait_until("settings.open && document.activeElement.name === 'max_tokens'")
    assert server.requests == []


def test_complete_mode_sends_the_text_as_it_is(page, server):
    page.click("[value=complete]")
    assert answer(page, server, " there was **a**", question="Once upon a time ") == " there was **a**"
    path, body, _ = server.requests[0]
    assert (path, body["prompt"]) == ("/v1/completions", "Once upon a time ")


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_the_page_and_the_real_server_understand_each_other(tab, live, mode):
    tab.open(live.url)
    tab.wait_until("document.title === 'small'")
    tab.click(f"[value={mode}]")
    tab.evaluate("document.querySelector('[name=max_tokens]').value = '8'")
    tab.evaluate("document.querySelector('[name=seed]').value = '5'")
    ask(tab, "The quick brown fox")
    tab.wait_until("document.querySelector('.turn[data-state=done]')")
    assert re.match(r"8 tokens · .* in the prompt", tab.text(".stats"))
    assert tab.problems() == []


# Failures ---------------------------------------------------------------------------------------------------------


def test_an_error_shows_its_message(page, server):
    server.replies.append(Reply(error=(400, "temperature=9 must be lower")))
    ask(page, "Hello")
    page.wait_until("document.querySelector('.failure p').textContent === 'temperature=9 must be lower'")
    page.wait_until(IS_IDLE)


def test_an_answer_that_breaks_off_is_kept_and_said_to_be_incomplete(page, server):
    server.replies.append(Reply(["half"], breaks=True))
    ask(page, "Hello")
    page.wait_until("document.querySelector('.turn[data-state=failed] .failure')?.checkVisibility()")
    assert page.text(".answer") == "half"


def test_a_model_without_a_chat_template_is_offered_as_a_completion(page, server):
    server.replies += [Reply(error=(400, "the model has no chat template")), Reply([" upon a time"])]
    ask(page, "Once")
    page.wait_until("document.querySelector('.failure button')")
    page.evaluate(button("Complete it as plain text"))
    page.wait_until("document.querySelector('.answer').textContent === ' upon a time'")
    assert server.requests[1][1]["prompt"] == "Once"


def test_a_server_with_a_key_is_answered_with_the_key_that_the_user_gives(open_page, server):
    server.key = "open sesame"
    page = open_page()
    page.wait_until("settings.open && document.activeElement.id === 'key'")
    page.type("open sesame", into="#key")
    page.press("Enter")
    page.wait_until("document.title === 'deepseek-v2-lite'")
    assert answer(page, server, "Welcome") == "Welcome"
    assert server.requests[0][2] == "Bearer open sesame"


# Hostile and long answers -----------------------------------------------------------------------------------------


def test_markup_in_an_answer_is_text(page, server):
    evil = "<script>evil = 1</script><img src=x onerror='evil = 1'>"
    for text in (evil, f"# {evil}", f"- **{evil}**", f"{evil} `{evil}`", f"```{evil}\n{evil}\n```"):
        assert evil in answer(page, server, text, question=evil)
    assert page.evaluate("typeof evil") == "undefined"
    assert page.evaluate("document.querySelectorAll('#turns :is(script, img)').length") == 0


def test_markdown_becomes_elements_whatever_the_pieces(page, server):
    text = "## Title\nSome **bold** and `code`, *so* 2 * 3 * 4.\n\n"
    text += "1. one\n   - deep\n2. two\n\n```py\nif a:\n\n    b\n```\nend"
    answer(page, server, text)
    whole = page.evaluate("document.querySelector('.answer').innerHTML")
    answer(page, server, *text)
    assert page.evaluate("document.querySelector('.turn:last-child .answer').innerHTML") == whole
    found = {
        tag: page.text(f".turn:last-child .answer {tag}") for tag in ("h4", "strong", "em", "p code", "ol ul li", "pre")
    }
    named = {"h4": "Title", "strong": "bold", "em": "so", "p code": "code", "ol ul li": "deep"}
    assert found == named | {"pre": "if a:\n\n    b"}
    assert page.text(".turn:last-child .answer > ol > li:last-child") == "two"


def test_the_space_that_templates_leave_before_an_answer_is_not_shown(page, server):
    assert answer(page, server, " Yes.") == "Yes."


def test_the_copy_button_of_a_code_block_copies_its_code_alone(page, server):
    answer(page, server, "So:\n```py\nif a:\n    b\n```\n")
    page.evaluate("void (navigator.clipboard.writeText = async (text) => { copied = text; })")
    page.click(".code button")
    page.wait_until("copied === 'if a:\\n    b'")


def test_lines_that_are_complete_are_never_drawn_again(page, server):
    more = threading.Event()
    server.replies.append(Reply(["first\nsecond\n", more, *["word "] * 10_000]))
    ask(page, "Talk")
    page.wait_until("document.querySelector('.answer').textContent === 'first\\nsecond'")
    page.evaluate("void (firstNode = document.querySelector('.answer').firstElementChild)")
    page.evaluate("void (secondLine = firstNode.lastElementChild)")
    more.set()
    page.wait_until(f"{IS_IDLE} && document.querySelector('.turn').dataset.state === 'done'")
    assert page.text(".answer") == "first\nsecond\n" + "word " * 10_000
    assert page.evaluate("firstNode.isConnected && secondLine.isConnected")
    # What is drawn anew each time is short although the line is long.
    assert page.evaluate("document.querySelector('.answer p').lastElementChild.textContent.length") <= 2000


def test_long_lines_of_any_kind_keep_their_text(page, server):
    lines = ["a" * 5000, " " * 5000, "-" * 5000, "# d" + "😀" * 3000, "- " + "b " * 3000, "```", "z" * 5000, "```"]
    shown = answer(page, server, *(line + "\n" for line in lines))
    assert [shown.count(mark) for mark in "a-bz"] == [5000, 5000, 3000, 5000]
    assert page.text(".answer h3") == "d" + "😀" * 3000
    assert page.evaluate("[...document.querySelectorAll('.answer *')].every((e) => e.textContent.isWellFormed())")


def test_the_end_stays_in_view_until_the_reader_scrolls_up(page, server):
    to_read, more = threading.Event(), threading.Event()
    server.replies.append(Reply(["line\n\n" * 100, to_read, "more\n\n" * 100, more, "more\n\n" * 100]))
    ask(page, "Talk")
    at_end = "scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 2"
    page.evaluate("void (scroll = document.querySelector('#scroll'))")
    page.wait_until(f"document.querySelectorAll('.answer p').length === 100 && {at_end}")
    to_read.set()
    page.wait_until(f"document.querySelectorAll('.answer p').length === 200 && {at_end}")
    page.evaluate("scroll.scrollTop = 100")
    page.wait_until("document.querySelector('#latest').checkVisibility()")
    more.set()
    page.wait_until(f"{IS_IDLE} && document.querySelectorAll('.answer p').length === 300")
    assert page.evaluate("scroll.scrollTop") == 100


# Looks, keys, memory ----------------------------------------------------------------------------------------------

BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def test_dark_and_light_follow_the_system_and_the_button(open_page):
    by_system, by_button = {}, {}
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        by_system[scheme] = page.evaluate(BACKGROUND)
        page.click("#theme")
        by_button[scheme] = page.evaluate(BACKGROUND)
        page.click("#theme")
    assert by_system["light"] != by_system["dark"]
    assert by_button == {"light": by_system["dark"], "dark": by_system["light"]}


def test_a_phone_never_scrolls_sideways(open_page, server):
    page = open_page(width=360, height=740)
    wide = "x" * 500
    answer(page, server, f"{wide}\n\n```\n{wide}\n```\n- {wide}\n# {wide}\n`{wide}`", question=wide)
    too_wide = "document.documentElement.scrollWidth > 360 || document.querySelector('#scroll').scrollWidth > 360"
    assert not page.evaluate(too_wide)
    page.click("#open-settings")
    assert not page.evaluate("settings.scrollWidth > 360")


def test_code_that_is_wider_than_the_page_scrolls_by_itself(open_page, server):
    page = open_page(width=360, height=740)
    answer(page, server, f"```\n{'x' * 500}\n```")
    page.evaluate("document.querySelector('pre').scrollLeft = 50")
    assert page.evaluate("document.querySelector('pre').scrollLeft") == 50


def test_shift_enter_breaks_the_line_and_enter_sends(page, server):
    page.type("one", into="#prompt")
    page.press("Enter", shift=True)
    page.send("Input.insertText", text="two")
    server.replies.append(Reply(["Read."]))
    page.press("Enter")
    page.wait_until(f"{IS_IDLE} && document.querySelector('.answer').textContent")
    assert page.text(".question") == "one\ntwo"


def test_a_reload_keeps_conversation_settings_and_draft(page, server):
    answer(page, server, "Hi **there**", question="Hello")
    page.click("#open-settings")
    page.type("Be brief.", into="#system")
    page.press("Escape")
    page.type("unsent", into="#prompt")
    page.reload()
    assert (page.text(".question"), page.text(".answer strong")) == ("Hello", "there")
    kept = page.evaluate("[document.querySelector('#system').value, document.querySelector('#prompt').value]")
    assert kept == ["Be brief.", "unsent"]


def test_a_reload_while_an_answer_streams_keeps_what_has_come(page, server):
    reply = Reply(["so far", threading.Event()])
    server.replies.append(reply)
    ask(page, "Go on")
    page.wait_until("document.querySelector('.answer').textContent === 'so far'")
    page.reload()
    assert reply.left.wait(10)
    assert page.text(".turn[data-state=stopped] .answer") == "so far"


def test_every_control_has_a_name(page):
    nameless = "[...document.querySelectorAll('button, input, textarea')].filter((e) => "
    nameless += "!(e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()))"
    assert page.evaluate(f"{nameless}.map((e) => e.outerHTML)") == []


def test_the_page_names_no_other_host():
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|(?:src|href)=\"(?!data:)", PAGE.read_text("utf-8")) == []
