"""Fill in the middle: prefix, suffix, then middle (PSM), for a share of the documents, by control tokens.

DeepSeek-Coder (arXiv 2401.14196, section 3.1.2) and the 16B model of Coder-V2 did so, at a rate of 0.5, on whole
documents before packing; V2 itself did not. This room tokenises with the tokenizer given and stores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from dsv2.data.dedup import lots, text_digest
from dsv2.data.shards import Tokenizer

# As DeepSeek-Coder spells them: before the prefix, where the middle is missing, before the middle.
BEGIN_TOKEN, HOLE_TOKEN, END_TOKEN = FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


class FimCapableTokenizer(Tokenizer, Protocol):
    """A tokenizer that names its control tokens; their spelling in a text stays text."""

    @property
    def control_tokens(self) -> Mapping[str, int]: ...


class FimTokenizer:
    """A tokenizer that rearranges a share `rate` of the texts; which and where they are cut a hash of each decides.

    A text is cut at two characters, all pairs being equally likely (arXiv 2207.14255: cuts inside of tokens
    are what completion meets). Its ids are `begin prefix hole suffix end middle`; the middle is nothing but the end
    of the document. Raises ValueError for a tokenizer without the three tokens.
    """

    def __init__(self, tokenizer: FimCapableTokenizer, rate: float) -> None:
        missing = [token for token in FIM_TOKENS if token not in tokenizer.control_tokens]
        if missing:
            raise ValueError(f"fim_rate={rate} needs a tokenizer with {', '.join(missing)}; train one with --fim")
        self._inner, self._rate = tokenizer, rate
        self._begin_id, self._hole_id, self._end_id = (tokenizer.control_tokens[token] for token in FIM_TOKENS)
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint

    def encode_batch(self, texts: list[str], /) -> list[list[int]]:
        """Ids of each text, of some of them rearranged."""
        pieces = [cut(text, self._rate) for text in texts]
        encoded = iter(self._inner.encode_batch([piece for parts in pieces for piece in parts]))
        return [self._join([next(encoded) for _ in parts]) for parts in pieces]

    def _join(self, parts: Sequence[Sequence[int]]) -> list[int]:
        if len(parts) == 1:
            return list(parts[0])
        prefix, middle, suffix = parts
        return [self._begin_id, *prefix, self._hole_id, *suffix, self._end_id, *middle]


def cut(text: str, rate: float) -> tuple[str, ...]:
    """(text,), or (prefix, middle, suffix) for a share `rate` of all texts. They concatenate to the text."""
    digest = text_digest(text)[None]
    chosen, *places = (int(lots(digest, f"fim {purpose}")[0]) for purpose in ("rate", "start", "stop"))
    if chosen >= rate * 2**64:
        return (text,)
    start, stop = sorted(place % (len(text) + 1) for place in places)
    return text[:start], text[start:stop], text[stop:]
