"""Claims about fill-in-the-middle: nothing of a text is lost, the share is the rate, control tokens frame the parts."""

import pytest

from dsv2.data import FIM_TOKENS
from dsv2.data.fim import FimTokenizer, cut
from dsv2.text import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}  # 深度\n" for i in range(1000)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS[:20], 300, FIM_TOKENS)


def test_the_parts_concatenate_to_the_text():
    assert all("".join(cut(text, 1.0)) == text for text in [*TEXTS, "", "a"])


def test_the_share_of_cut_texts_is_the_rate():
    # Three standard deviations of 1000 draws at 0.3 are 0.043.
    share = sum(len(cut(text, 0.3)) == 3 for text in TEXTS) / len(TEXTS)
    assert abs(share - 0.3) < 0.043


@pytest.mark.parametrize(("rate", "parts"), [(0.0, 1), (1.0, 3)])
def test_rates_0_and_1_are_none_and_all(rate, parts):
    assert {len(cut(text, rate)) for text in TEXTS} == {parts}


def test_cuts_fall_everywhere():
    # Of two uniform places the earlier is at a third on average.
    starts = [len(cut(text, 1.0)[0]) / len(text) for text in TEXTS]
    assert abs(sum(starts) / len(starts) - 1 / 3) < 0.03


def test_ids_are_prefix_suffix_middle_and_decode_back(tokenizer):
    begin, hole, end = (tokenizer.control_tokens[token] for token in FIM_TOKENS)
    for ids, text in zip(FimTokenizer(tokenizer, 1.0).encode_batch(TEXTS[:50]), TEXTS, strict=False):
        assert ids[0] == begin
        at_hole, at_end = ids.index(hole), ids.index(end)
        prefix, suffix, middle = (
            tokenizer.decode(part) for part in (ids[1:at_hole], ids[at_hole + 1 : at_end], ids[at_end + 1 :])
        )
        assert (prefix, middle, suffix) == cut(text, 1.0)


def test_texts_that_are_not_cut_are_the_tokenizers(tokenizer):
    half = FimTokenizer(tokenizer, 0.5).encode_batch(TEXTS[:100])
    whole = tokenizer.encode_batch(TEXTS[:100])
    for text, ids, plain in zip(TEXTS, half, whole, strict=False):
        assert (ids == plain) == (len(cut(text, 0.5)) == 1)


def test_control_tokens_spelled_in_a_text_stay_text(tokenizer):
    text = "".join(FIM_TOKENS)
    (ids,) = FimTokenizer(tokenizer, 1.0).encode_batch([text])
    assert [ids.count(tokenizer.control_tokens[token]) for token in FIM_TOKENS] == [1, 1, 1]


def test_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(ValueError, match="fim_rate=0.5 needs a tokenizer with <｜fim▁begin｜>"):
        FimTokenizer(Tokenizer.train(TEXTS[:20], 300), 0.5)
