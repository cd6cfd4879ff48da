"""RoBERTa (arXiv 1907.11692): BERT's blocks, positions counted from the padding token, a dense layer in the head."""

from __future__ import annotations

from fedsim.families.bert import BERT_BLOCK, BERT_DROPOUTS, BERT_LINEARS
from fedsim.families.family import Family, encoder_shape

_ROWS = (50265, 514)
"""Of the word and of the position embeddings."""

ROBERTA = Family(
    name="roberta",
    title="Roberta",
    linears=BERT_LINEARS,
    block=BERT_BLOCK,
    pooled="first",
    biases=frozenset(BERT_LINEARS),
    dense="tanh",
    classifier={"dense": "classifier.dense", "out_proj": "classifier.out_proj"},
    counts_from_padding=True,
    types="ignored",
    pooler_option=True,
    dropouts=BERT_DROPOUTS,
    shapes=(
        encoder_shape("roberta-base", "roberta", 12, 768, 12, *_ROWS, dense=True),
        encoder_shape("roberta-large", "roberta", 24, 1024, 16, *_ROWS, dense=True),
    ),
)
