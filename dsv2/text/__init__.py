"""Strings to token ids and back, and conversations to prompts.
Paper: section 3.1.1 (the byte-level BPE vocabulary of DeepSeek 67B); the chat formats are the model cards'.
Does not: import torch or transformers, download, or know any model.
"""

from dsv2.text.chat import DEEPSEEK_V2, DEEPSEEK_V2_5, encode_chat, render, template_of
from dsv2.text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "DEEPSEEK_V2",
    "DEEPSEEK_V2_5",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "render",
    "template_of",
]
