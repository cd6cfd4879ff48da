"""Prompts with their responses to token ids, for language models.

Unspecified in the paper, which classifies; we chose: begin token (where the tokenizer has one), prompt, newline and
context (where there is one), newline; then the response and the end token (where there is one). No template, no words
of ours, so that no checkpoint is favoured. Learned and scored is the response with its end token, given the prompt.

A sample longer than `max_length` keeps as much of its response as fits beside the prompt, and at least half of
`max_length` (rounded up) where the response is that long: then the prompt's end is cut, and the response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fedsim.errors import ConfigError, DataError
from fedsim.learn.train.batches import EncodedText, padded, padding_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 2
"""Tokens: one of the prompt, one of the response."""


class AnsweredTextLike(Protocol):
    """Prompts and responses, N of each."""

    @property
    def texts(self) -> Sequence[str]:
        """Prompts."""

    @property
    def pairs(self) -> Sequence[str] | None:
        """Contexts, each perhaps empty; None where there are none."""

    @property
    def labels(self) -> ArrayLike:
        """Categories, shape (N,)."""

    @property
    def responses(self) -> Sequence[str] | None:
        """Responses."""


def encode_prompts(texts: AnsweredTextLike, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedText:
    """Tokenize every prompt and response once.

    Raises:
        ConfigError: a `max_length` below 2.
        DataError: no samples, or a prompt or response without a single token.
        ValueError: texts without responses.
    """
    if texts.responses is None:
        raise ValueError("these texts have no responses")
    if max_length < _SHORTEST:
        raise ConfigError(
            f"train.max_length: value {max_length} is not allowed with data.task causal_lm (at least {_SHORTEST}: a "
            "token of the prompt and one of the response)"
        )
    if len(texts.responses) == 0:
        raise DataError("data has no samples; at least 1 is needed")
    contexts = texts.pairs or [""] * len(texts.texts)
    prompts = [
        f"{text}\n{context}\n" if context else f"{text}\n" for text, context in zip(texts.texts, contexts, strict=True)
    ]
    # One token more than fits, so that what is cut shows.
    first = _tokens(tokenizer, prompts, max_length + 1, [tokenizer.bos_token_id], [])
    second = _tokens(tokenizer, list(texts.responses), max_length + 1, [], [tokenizer.eos_token_id])
    rows, starts, cut = [], [], 0
    for sample, (prompt, response) in enumerate(zip(first, second, strict=True)):
        if not prompt or not response:
            what = "text" if not prompt else "label"
            raise DataError(f"data.{what} of sample {sample} has no tokens; at least 1 is needed")
        cut += len(prompt) + len(response) > max_length
        response = response[: max(max_length - len(prompt), max_length - max_length // 2)]
        prompt = prompt[: max_length - len(response)]
        rows.append([*prompt, *response])
        starts.append(len(prompt))
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return EncodedText(
        input_ids=padded(rows, lengths, padding_token(tokenizer)),
        lengths=lengths,
        labels=np.asarray(texts.labels, dtype=np.int64),
        token_type_ids=None,
        response_start=np.array(starts, dtype=np.int64),
        cut=cut,
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    strings: list[str],
    most: int,
    before: list[int | None],
    after: list[int | None],
) -> list[list[int]]:
    """At most `most` token ids of each string, between the special tokens, of which None is one there is not."""
    rows = tokenizer(strings, add_special_tokens=False, padding=False, truncation=True, max_length=most)
    ids: list[list[int]] = rows["input_ids"]
    head = [token for token in before if token is not None]
    tail = [token for token in after if token is not None]
    return [[*head, *row, *tail] for row in ids]
