"""The record of a backbone family: where its parts lie, how it counts positions, what it calls its widths.

Facts only, and no tensor library: the learner, the exports, the cost model and the reader of ``config.json`` look here
instead of comparing names. Paths are module paths inside the base model of the Hugging Face library (``BertModel``,
``LlamaModel``), with ``{}`` for the block's number. A family of a known kind of block (`EncoderBlock`, `DecoderBlock`)
needs no other code: see `fedsim.families.family_catalogue.register_family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from fedsim.structure import ModelShape


class Role(StrEnum):
    """What a prunable Linear does in its block."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUT = "attention_out"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


Activation = Literal["tanh", "relu", "gelu"]
"""Between the two layers of a classification head."""


@dataclass(frozen=True)
class EncoderBlock:
    """A block that sees the whole sentence, with a norm after each residual sum (BERT, arXiv 1810.04805).

    Attributes:
        attention_norm, ffn_norm: the norms after attention and after the feed-forward, paths inside the block.
        activation: of the feed-forward, a path inside the block.
        embeddings: the module that turns tokens into vectors, norm included.
    """

    attention_norm: str
    ffn_norm: str
    activation: str
    embeddings: str = "embeddings"

    @property
    def hidden_vectors(self) -> int:
        """Hidden-wide parameters of the norms: weight and bias of two layer norms."""
        return 4


@dataclass(frozen=True)
class DecoderBlock:
    """A block that sees what is before a token, with norms before attention and before a gated feed-forward, and rotary
    positions (LLaMA, arXiv 2302.13971).

    Attributes:
        attention_norm, ffn_norm, activation: paths inside the block.
        embeddings, rotary, final_norm: paths inside the base model.
        output: the product with the vocabulary, a path inside the causal language model.
    """

    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    activation: str = "mlp.act_fn"
    embeddings: str = "embed_tokens"
    rotary: str = "rotary_emb"
    final_norm: str = "norm"
    output: str = "lm_head"

    @property
    def hidden_vectors(self) -> int:
        """Hidden-wide parameters of the norms: weights of two RMS norms."""
        return 2


@dataclass(frozen=True)
class HeadBias:
    """A bias on attention scores with a column for each head, which all blocks share: pruned heads drop theirs.

    Attributes:
        table: the frozen embedding ``(distances, heads)`` that it is looked up in.
        method: of the base model, a path: takes a tensor ``(batch, tokens, ...)`` and gives ``(batch, heads, tokens,
            tokens)``, which depends on the distance of two tokens alone.
        reader: the module of block ``{}`` that gets it.
        argument, place: how it gets it: the keyword, and the place where it comes without one.
        width: attribute of `reader` that says how wide its heads are together.
    """

    table: str
    method: str
    reader: str
    argument: str
    place: int
    width: str


@dataclass(frozen=True)
class ConfigKeys:
    """What ``config.json`` calls the widths."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    ffn: str = "intermediate_size"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocab: str = "vocab_size"
    positions: str = "max_position_embeddings"
    window: str = "sliding_window"


@dataclass(frozen=True)
class Family:
    """One backbone family.

    Attributes:
        name: its ``model_type`` in ``config.json``.
        title: what the library's classes begin with: ``Bert`` of ``BertModel``.
        linears: the prunable Linears, in the order of a block; a gate only where the feed-forward is gated.
        block: its kind of block, and where the other parts of one lie.
        pooled: what a classifier reads by itself: the frozen ``pooler`` of the ``first`` token, the ``first`` token,
            or the ``last`` one that is not padding.
        biases: the Linears that always have one.
        dense: the activation behind a trained dense layer between that and the classes; None: there is none.
        classifier: the library's names of our head's modules (``""``: the only one) in its sequence classifier; None
            where that has another form.
        counts_from_padding: positions are counted from the padding token's number on, and tokens of that id do not
            count (RoBERTa).
        padding_index: that number, where the library takes it from no configuration.
        types: whether token types are ``read``, or embedded and always 0 (``ignored``), or unknown (``none``).
        pooler_option: whether the library's base model takes ``add_pooling_layer``.
        dropouts: the keys of the configuration that are set to 0.
        head_bias: a bias of attention by head.
        attentions: the library's attention forms that it has.
        keys: names of its widths.
        shapes: published widths that need no file.
    """

    name: str
    title: str
    linears: Mapping[Role, str]
    block: EncoderBlock | DecoderBlock
    pooled: Literal["pooler", "first", "last"]
    biases: frozenset[Role]
    dense: Activation | None = None
    classifier: Mapping[str, str] | None = None
    counts_from_padding: bool = False
    padding_index: int | None = None
    types: Literal["read", "ignored", "none"] = "none"
    pooler_option: bool = False
    dropouts: tuple[str, ...] = ()
    head_bias: HeadBias | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    shapes: tuple[ModelShape, ...] = ()

    def __post_init__(self) -> None:
        wanted = set(Role) - (set() if self.causal else {Role.GATE})
        if set(self.linears) != wanted:
            raise ValueError(f"family '{self.name}': linears must be given for {', '.join(sorted(wanted))}")
        if self.head_bias is not None and self.pooled == "last":
            raise ValueError(f"family '{self.name}': a bias by head goes with the first token, not with the last")

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it, so that the model can predict the next token."""
        return isinstance(self.block, DecoderBlock)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate projection beside its up projection."""
        return Role.GATE in self.linears

    @property
    def blocks(self) -> str:
        """Path of the list of blocks."""
        return self.linears[Role.QUERY].split(".{}.", 1)[0]


def encoder_shape(
    name: str, architecture: str, layers: int, hidden: int, heads: int, vocab: int, positions: int, dense: bool
) -> ModelShape:
    """An encoder with the usual proportions: FFN four times the hidden width."""
    head_dim, pooler_width = hidden // heads, hidden if dense else 0
    return ModelShape(
        name,
        architecture,
        layers,
        hidden,
        heads,
        heads,
        head_dim,
        4 * hidden,
        vocab,
        positions,
        pooler_width=pooler_width,
    )
