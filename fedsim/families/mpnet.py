"""MPNet (arXiv 2004.09297): BERT's blocks with a bias on attention by distance and head, RoBERTa's positions and head.

The bias comes from one table ``(32, heads)``, which all blocks read. It is frozen, and counts neither as prunable nor
among the embeddings (384 values in mpnet-base). The library has no other attention than its own for it.
"""

from __future__ import annotations

from fedsim.families.bert import BERT_DROPOUTS
from fedsim.families.family import EncoderBlock, Family, HeadBias, Role, encoder_shape

_LINEARS = {
    Role.QUERY: "encoder.layer.{}.attention.attn.q",
    Role.KEY: "encoder.layer.{}.attention.attn.k",
    Role.VALUE: "encoder.layer.{}.attention.attn.v",
    Role.ATTENTION_OUT: "encoder.layer.{}.attention.attn.o",
    Role.UP: "encoder.layer.{}.intermediate.dense",
    Role.DOWN: "encoder.layer.{}.output.dense",
}

MPNET = Family(
    name="mpnet",
    title="MPNet",
    linears=_LINEARS,
    block=EncoderBlock("attention.LayerNorm", "output.LayerNorm", "intermediate.intermediate_act_fn"),
    pooled="first",
    biases=frozenset(_LINEARS),
    dense="tanh",
    classifier={"dense": "classifier.dense", "out_proj": "classifier.out_proj"},
    counts_from_padding=True,
    padding_index=1,  # whatever pad_token_id the configuration gives
    pooler_option=True,
    dropouts=BERT_DROPOUTS,
    head_bias=HeadBias(
        table="encoder.relative_attention_bias",
        method="encoder.compute_position_bias",
        reader="encoder.layer.{}.attention.attn",
        argument="position_bias",
        place=2,
        width="all_head_size",
    ),
    attentions=("eager",),
    shapes=(encoder_shape("mpnet-base", "mpnet", 12, 768, 12, 30527, 514, dense=True),),
)
