"""What a language model's product with its vocabulary, and the loss over it, ask of a device.

Counted for *all* tokens of a step, prompts and padding too: that is what standard training code (Hugging Face's) does
on a device. The engines of `fedsim.learn` score response tokens only, which saves host time and never shows on the
clock. Launches are not here: by count of the operations that PyTorch dispatches a language model's output and loss take
no more of them than a classifier's, so `fedsim.cost.workload.MODEL_LAUNCHES` covers them.

Every function gives zeros for a classifier.
"""

from __future__ import annotations

from fedsim.structure import ModelShape

LOSS_BYTES = 4
"""The loss is taken in fp32 whatever the precision."""
LOSS_FORWARD_PASSES, LOSS_BACKWARD_PASSES = 2, 4
"""Logit-sized reads and writes (status: derived): log-softmax (2); its gradient written, then read with the output and
turned into the logits' (4)."""
SAVED_LOGITS = 2
"""Logit-sized tensors alive when the backward pass starts: the logits, and their log-softmax in fp32. Times
`fedsim.cost.memory.LOGIT_GROWTH` that is the four at the peak, where both have a gradient beside them."""


def own_output_weights(shape: ModelShape) -> int:
    """Weights of the product with the vocabulary that are not the word embeddings'."""
    return 0 if shape.tied else shape.output_weights


def output_work(shape: ModelShape, tokens: int, value_bytes: int, backward_products: int) -> tuple[float, float]:
    """Operations and bytes of product and loss.

    Args:
        value_bytes: of a weight or an activation.
        backward_products: 0 in inference (no loss either), 1 through frozen weights, 2 where they are trained.
    """
    if not shape.is_language_model:
        return 0.0, 0.0
    products = 1 + backward_products
    flops = 2.0 * tokens * shape.output_weights
    moved = float(value_bytes * (shape.output_weights + tokens * (shape.hidden + shape.vocab)))
    passes = 0
    if backward_products:
        passes = (LOSS_FORWARD_PASSES + LOSS_BACKWARD_PASSES) * LOSS_BYTES
        if value_bytes != LOSS_BYTES:
            passes += 2 * (value_bytes + LOSS_BYTES)  # to fp32 and, in the backward pass, back
    return products * flops, products * moved + float(passes * tokens * shape.vocab)


def saved_logit_bytes(shape: ModelShape, tokens: int, value_bytes: int) -> int:
    """Bytes of logits kept for the backward pass; in inference the first of them alone is there."""
    return (value_bytes + (SAVED_LOGITS - 1) * LOSS_BYTES) * logits(shape, tokens)


def logits(shape: ModelShape, tokens: int) -> int:
    """How many logits a step has."""
    return tokens * shape.vocab if shape.is_language_model else 0
