"""LLaMA (arXiv 2302.13971), and the many decoders of its form: TinyLlama, SmolLM2."""

from __future__ import annotations

from fedsim.families.family import DecoderBlock, Family, Role
from fedsim.structure import ModelShape

LLAMA_LINEARS = {
    Role.QUERY: "layers.{}.self_attn.q_proj",
    Role.KEY: "layers.{}.self_attn.k_proj",
    Role.VALUE: "layers.{}.self_attn.v_proj",
    Role.ATTENTION_OUT: "layers.{}.self_attn.o_proj",
    Role.GATE: "layers.{}.mlp.gate_proj",
    Role.UP: "layers.{}.mlp.up_proj",
    Role.DOWN: "layers.{}.mlp.down_proj",
}

LLAMA = Family(
    name="llama",
    title="Llama",
    linears=LLAMA_LINEARS,
    block=DecoderBlock(),
    pooled="last",
    biases=frozenset(),  # a configuration may ask for some (attention_bias, mlp_bias); the clock does not count them
    dropouts=("attention_dropout",),
    shapes=(
        ModelShape("tinyllama-1.1b", "llama", 22, 2048, 32, 4, 64, 5632, vocab=32000, positions=0, gated=True),
        ModelShape("llama-7b", "llama", 32, 4096, 32, 32, 128, 11008, vocab=32000, positions=0, gated=True),
        ModelShape("smollm2-135m", "llama", 30, 576, 9, 3, 64, 1536, vocab=49152, positions=0, tied=True, gated=True),
    ),
)
