"""From token vectors to scores: pooling and the trained classification head, or the next token's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedsim.families.family import Activation, Family
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape

HEAD_STD = 0.02
"""Standard deviation of the head's initial weights, as in BERT (arXiv 1810.04805)."""


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
}
"""Between the layers of a head, by the family's word for it."""


class _TokenHead(nn.Module):
    """RoBERTa's form of head: dense, activation, projection (dropout 0)."""

    def __init__(self, width: int, labels: int, activation: Activation) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[activation]
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Vectors ``(batch, width)`` to logits ``(batch, labels)``."""
        return self.out_proj(self._activation(self.dense(features)))


def make_head(shape: ModelShape, pooling: str) -> nn.Module:
    """The head of a family; with ``mean`` pooling always one linear layer. Its parameters are unset yet."""
    dense = family_of(shape).dense
    if dense is not None and pooling == "native":
        return _TokenHead(shape.hidden, shape.labels, dense)
    return nn.Linear(shape.hidden, shape.labels)


def _additive_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(batch, 1, 1, tokens)``: 0 for a token, the lowest number for padding.

    The encoders take a ready floating mask as it is. Making it here spares their own mask building, a tenth of a small
    model's step. It must not be boolean: eager attention would add it.
    """
    padding = 1.0 - attention_mask[:, None, None, :].to(dtype)
    return padding * torch.finfo(dtype).min


class SentenceClassifier(nn.Module):
    """Encoder, pooling, head. `pooling` is ``native`` or ``mean``."""

    def __init__(self, encoder: nn.Module, head: nn.Module, family: Family, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._family = family
        self._pooling = pooling

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Integer tensors of shape ``(batch, tokens)`` to logits ``(batch, labels)``.

        The mask is two-dimensional, 1 for a token and 0 for padding; every row has a token. `token_type_ids` is used
        only where the family reads token types.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not self._family.causal:
            inputs["attention_mask"] = _additive_mask(attention_mask, next(self.head.parameters()).dtype)
        if self._family.types == "read" and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        options = {"use_cache": False} if self._family.causal else {}
        output = self.encoder(**inputs, **options)
        return self.head(self._pool(output, attention_mask))

    def _pool(self, output: object, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = output.last_hidden_state  # type: ignore[attr-defined]
        if self._pooling == "mean":
            weights = attention_mask.to(tokens.dtype).unsqueeze(-1)
            return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        if self._family.pooled == "pooler":
            return output.pooler_output  # type: ignore[attr-defined]
        if self._family.pooled == "first":
            return tokens[:, 0]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (attention_mask * places).argmax(dim=1)
        return tokens[torch.arange(tokens.shape[0], device=tokens.device), last]


class NextToken(nn.Module):
    """A Hugging Face causal language model as it is: its own frozen product with the vocabulary, no head of ours."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def output(self) -> nn.Linear:
        """The frozen product with the vocabulary (``lm_head``; tied to the word embeddings or not)."""
        layer: nn.Linear = self.model.get_output_embeddings()
        return layer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Integer tensors of shape ``(batch, tokens)`` to logits of each token's successor ``(batch, tokens, vocab)``.

        `token_type_ids`, which some tokenizers make, are not used.
        """
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits
