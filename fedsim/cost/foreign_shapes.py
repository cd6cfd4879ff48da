"""Shapes that the clock can price and no learner here trains: of models that others have measured.

A vision transformer is priced as an encoder whose tokens are its patches and class token (``--seq-len 197`` for 224
pixels in patches of 16); its patch projection stands for embeddings of as many weights. Gemma's extra norms are not
counted. DistilBERT stands here without the dense layer of its own classifier: whoever measured it does not say.
"""

from __future__ import annotations

from dataclasses import replace

from fedsim.families.bert import BERT
from fedsim.families.distilbert import DISTILBERT
from fedsim.families.llama import LLAMA
from fedsim.structure import ModelShape


def _vit(name: str, layers: int, hidden: int, heads: int, patch: int) -> ModelShape:
    patches = (224 // patch) ** 2 + 1
    # Weights of the patch projection, in rows of the hidden width as embeddings are.
    return ModelShape(
        name,
        BERT.name,
        layers,
        hidden,
        heads,
        heads,
        hidden // heads,
        4 * hidden,
        3 * patch * patch,
        patches,
        labels=1000,
    )


FOREIGN_SHAPES = {
    shape.name: shape
    for shape in (
        replace(DISTILBERT.shapes[0], name=DISTILBERT.name, pooler_width=0),
        ModelShape(
            "gemma-3-270m", LLAMA.name, 18, 640, 4, 1, 256, 2048, vocab=262144, positions=0, tied=True, gated=True
        ),
        _vit("vit-b-16", 12, 768, 12, 16),
        _vit("vit-b-32", 12, 768, 12, 32),
        _vit("vit-l-16", 24, 1024, 16, 16),
    )
}
"""By name; the classifier's outputs are the caller's."""
