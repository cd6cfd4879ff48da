"""Prompts and responses to tokens: what stands where, and what is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import _tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsim.data.labelled import LabelledText
from fedsim.errors import ConfigError, DataError
from fedsim.learn.train.prompts import encode_prompts

CHARACTERS = "\n abcdefghij"


def by_characters(**specials: str) -> PreTrainedTokenizerFast:
    """One token per character, so that newlines show."""
    vocab = {token: place for place, token in enumerate([*specials.values(), *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="j"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


BOTH = by_characters(bos_token="<s>", eos_token="</s>")


def text(*rows: tuple[str, str, str]) -> LabelledText:
    prompts, contexts, responses = zip(*rows, strict=True)
    return LabelledText(prompts, contexts, np.zeros(len(rows), dtype=np.int64), None, responses)


def parts(encoded, sample: int, tokenizer=BOTH) -> tuple[list[str], list[str]]:
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids[sample, : encoded.lengths[sample]].tolist())
    start = int(encoded.response_start[sample])
    return tokens[:start], tokens[start:]


def test_begin_prompt_context_newlines_response_end():
    encoded = encode_prompts(text(("ab", "cd", "ef"), ("a", "", "ghi")), BOTH, 20)
    assert parts(encoded, 0) == (["<s>", *"ab\ncd\n"], [*"ef", "</s>"])
    assert parts(encoded, 1) == (["<s>", *"a\n"], [*"ghi", "</s>"])
    assert encoded.token_type_ids is None
    assert (encoded.input_ids[1, encoded.lengths[1] :] == BOTH.eos_token_id).all()


def test_without_contexts_and_without_special_tokens():
    bare = by_characters()
    rows = dataclasses.replace(text(("ab", "", "ef")), pairs=None)
    assert parts(encode_prompts(rows, bare, 20), 0, bare) == ([*"ab\n"], [*"ef"])


def test_special_tokens_of_the_tokenizers_own_template_are_not_added_too():
    """The tiny checkpoints' tokenizer puts begin and end around every text by itself."""
    tokenizer = _tokenizer("llama")
    encoded = encode_prompts(text(("w1 w2", "", "w3")), tokenizer, 20)
    assert parts(encoded, 0, tokenizer) == (["<s>", "w1", "w2"], ["w3", "</s>"])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 40))
def test_a_long_sample_keeps_its_beginnings_and_half_for_the_response(prompt, response, longest):
    encoded = encode_prompts(text(("a" * prompt, "", "b" * response)), BOTH, longest)
    first, second = parts(encoded, 0)
    whole_first, whole_second = ["<s>", *"a" * prompt, "\n"], [*"b" * response, "</s>"]
    assert first == whole_first[: len(first)]
    assert second == whole_second[: len(second)]
    assert len(first) >= 1
    assert len(first) + len(second) == min(longest, len(whole_first) + len(whole_second))
    assert len(second) >= min(len(whole_second), -(-longest // 2))


@pytest.mark.parametrize("longest", [0, 1])
def test_no_room_for_both_is_refused(longest):
    with pytest.raises(ConfigError, match=rf"train.max_length: value {longest} is not allowed .*at least 2"):
        encode_prompts(text(("a", "", "b")), BOTH, longest)


def test_what_has_no_tokens_is_refused():
    rows = text(("a", "", "b"))
    words = PreTrainedTokenizerFast(tokenizer_object=by_words(), eos_token="</s>")
    with pytest.raises(DataError, match=r"data.text of sample 0 has no tokens"):
        encode_prompts(text(("\n", "", "w")), words, 8)
    words = PreTrainedTokenizerFast(tokenizer_object=by_words(), bos_token="</s>")
    with pytest.raises(DataError, match=r"data.label of sample 1 has no tokens"):
        encode_prompts(text(("w", "", "w"), ("w", "", "\n")), words, 8)
    with pytest.raises(ValueError, match="no responses"):
        encode_prompts(dataclasses.replace(rows, responses=None), BOTH, 8)
    with pytest.raises(DataError, match="no samples"):
        encode_prompts(rows.take(np.array([], dtype=np.int64)), BOTH, 8)


def by_words() -> Tokenizer:
    """Words between white space, of which newlines are a part."""
    core = Tokenizer(models.WordLevel({"w": 0, "</s>": 1}, unk_token="w"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core
