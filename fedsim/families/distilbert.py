"""DistilBERT (arXiv 1910.01108): half of BERT's blocks, no token types, no pooler, a dense layer in the head."""

from __future__ import annotations

from fedsim.families.family import ConfigKeys, EncoderBlock, Family, Role, encoder_shape

_LINEARS = {
    Role.QUERY: "transformer.layer.{}.attention.q_lin",
    Role.KEY: "transformer.layer.{}.attention.k_lin",
    Role.VALUE: "transformer.layer.{}.attention.v_lin",
    Role.ATTENTION_OUT: "transformer.layer.{}.attention.out_lin",
    Role.UP: "transformer.layer.{}.ffn.lin1",
    Role.DOWN: "transformer.layer.{}.ffn.lin2",
}

DISTILBERT = Family(
    name="distilbert",
    title="DistilBert",
    linears=_LINEARS,
    block=EncoderBlock("sa_layer_norm", "output_layer_norm", "ffn.activation"),
    pooled="first",
    biases=frozenset(_LINEARS),
    dense="relu",
    classifier={"dense": "pre_classifier", "out_proj": "classifier"},
    dropouts=("dropout", "attention_dropout", "seq_classif_dropout"),
    keys=ConfigKeys(layers="n_layers", hidden="dim", heads="n_heads", ffn="hidden_dim"),
    shapes=(encoder_shape("distilbert-base", "distilbert", 6, 768, 12, 30522, 512, dense=True),),
)
