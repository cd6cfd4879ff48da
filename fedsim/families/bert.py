"""BERT (arXiv 1810.04805), and what the encoders after it took over."""

from __future__ import annotations

from fedsim.families.family import EncoderBlock, Family, Role, encoder_shape

BERT_LINEARS = {
    Role.QUERY: "encoder.layer.{}.attention.self.query",
    Role.KEY: "encoder.layer.{}.attention.self.key",
    Role.VALUE: "encoder.layer.{}.attention.self.value",
    Role.ATTENTION_OUT: "encoder.layer.{}.attention.output.dense",
    Role.UP: "encoder.layer.{}.intermediate.dense",
    Role.DOWN: "encoder.layer.{}.output.dense",
}
BERT_BLOCK = EncoderBlock("attention.output.LayerNorm", "output.LayerNorm", "intermediate.intermediate_act_fn")
BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_ROWS = (30522, 512)
"""Of the word and of the position embeddings."""

BERT = Family(
    name="bert",
    title="Bert",
    linears=BERT_LINEARS,
    block=BERT_BLOCK,
    pooled="pooler",
    biases=frozenset(BERT_LINEARS),
    classifier={"": "classifier"},
    types="read",
    pooler_option=True,
    dropouts=BERT_DROPOUTS,
    shapes=(
        encoder_shape("bert-base", "bert", 12, 768, 12, *_ROWS, dense=False),
        encoder_shape("bert-large", "bert", 24, 1024, 16, *_ROWS, dense=False),
        encoder_shape("minilm-l6", "bert", 6, 384, 12, *_ROWS, dense=False),
        encoder_shape("minilm", "bert", 6, 384, 12, *_ROWS, dense=False),  # the optional package's checkpoint
    ),
)
