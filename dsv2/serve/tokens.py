"""/tokenize, /detokenize and /tokenizer_info: the server's tokenizer for clients that have none, in vLLM's form."""

from __future__ import annotations

import reprlib
from typing import Any

from dsv2.serve.chat import take_messages
from dsv2.serve.protocol import Fields
from dsv2.serve.tools import Tools
from dsv2.text import Tokenizer, encode_chat, template_of


def tokenize(fields: Fields, tokenizer: Tokenizer, max_model_len: int) -> dict[str, Any]:
    """Ids of a `prompt`, or of `messages` as a chat prompt. Raises ValueError as the tokenizer does.

    Where /v1/completions takes a spelled control token for text, this makes a control token of it, as other tokenizer
    endpoints do and lm-eval needs to find the id of the end of sequence; `parse_special` false makes it text here too.
    """
    prompt = fields.take("prompt", str)
    wants_text = fields.take("return_token_strs", bool, False)
    add_bos = fields.take("add_special_tokens", bool, True)
    parse_special = fields.take("parse_special", bool, True)
    if prompt is None:
        adds_prompt = fields.take("add_generation_prompt", bool, True)
        template = template_of(tokenizer)
        messages, tools = take_messages(fields, template), Tools.take(fields, template)
        ids = encode_chat(tokenizer, messages, add_generation_prompt=adds_prompt, tools=tools.functions)
    else:
        ids = tokenizer.encode(prompt, add_bos=add_bos, parse_special=parse_special)
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids] if wants_text else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts}


def detokenize(fields: Fields, tokenizer: Tokenizer) -> dict[str, Any]:
    """The text of `tokens`, control tokens spelled out. Raises ValueError for what is no list of token ids."""
    ids = fields.take("tokens", list)
    if ids is None or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
        raise ValueError(f"tokens={reprlib.repr(ids)} must be a list of ids below {tokenizer.vocab_size}")
    return {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}


def tokenizer_info(tokenizer: Tokenizer, max_model_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": max_model_len,
        # What chat requests are laid out with.
        "chat_template": template_of(tokenizer),
    }
