"""The tokenizer's endpoints say what the tokenizer says."""

from __future__ import annotations

import httpx

from dsv2.text import DEEPSEEK_V2, encode_chat
from tests.serve.live import get_tokenizer

TEXT = "The quick fox"


def test_text_becomes_the_tokenizers_ids(client: httpx.Client) -> None:
    tokenizer = get_tokenizer()
    for add_special_tokens in (True, False):
        body = {"prompt": TEXT, "add_special_tokens": add_special_tokens}
        said = client.post("/tokenize", json=body).json()
        assert said["tokens"] == tokenizer.encode(TEXT, add_bos=add_special_tokens)
        assert said["count"] == len(said["tokens"])


def test_messages_become_the_prompt_of_a_chat(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": TEXT}]
    said = client.post("/tokenize", json={"messages": messages}).json()
    assert said["tokens"] == encode_chat(get_tokenizer(), messages)


def test_a_spelled_control_token_is_found_unless_told_otherwise(client: httpx.Client) -> None:
    tokenizer = get_tokenizer()
    body = {"prompt": tokenizer.eos_token, "add_special_tokens": False}
    assert client.post("/tokenize", json=body).json()["tokens"] == [tokenizer.eos_id]
    plain = client.post("/tokenize", json=body | {"parse_special": False}).json()["tokens"]
    assert plain == tokenizer.encode(tokenizer.eos_token)


def test_token_strings_join_to_the_text(client: httpx.Client) -> None:
    body = {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    assert "".join(client.post("/tokenize", json=body).json()["token_strs"]) == TEXT


def test_ids_become_text_with_control_tokens_spelled_out(client: httpx.Client) -> None:
    tokenizer = get_tokenizer()
    ids = [*tokenizer.encode(TEXT, add_bos=True), tokenizer.eos_id]
    said = client.post("/detokenize", json={"tokens": ids}).json()
    assert said == {"prompt": tokenizer.bos_token + TEXT + tokenizer.eos_token}


def test_clients_learn_special_tokens_and_template(client: httpx.Client) -> None:
    said = client.get("/tokenizer_info").json()
    tokenizer = get_tokenizer()
    assert (said["bos_token"], said["eos_token"]) == (tokenizer.bos_token, tokenizer.eos_token)
    assert said["chat_template"] == DEEPSEEK_V2
