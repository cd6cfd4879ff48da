"""Qwen2 (arXiv 2407.10671): LLaMA's form with biases on query, key and value."""

from __future__ import annotations

from fedsim.families.family import DecoderBlock, Family, Role
from fedsim.families.llama import LLAMA_LINEARS
from fedsim.structure import ModelShape

QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    linears=LLAMA_LINEARS,
    block=DecoderBlock(),
    pooled="last",
    biases=frozenset({Role.QUERY, Role.KEY, Role.VALUE}),
    dropouts=("attention_dropout",),
    shapes=(
        ModelShape("qwen2-0.5b", "qwen2", 24, 896, 14, 2, 64, 4864, vocab=151936, positions=0, tied=True, gated=True),
    ),
)
