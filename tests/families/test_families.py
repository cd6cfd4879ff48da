"""The families' records, the one reader of config.json, and that nobody else compares names."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import fedsim
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, kept_sums, memory_parts, step_work
from fedsim.errors import ModelError
from fedsim.families.config_json import family_in, longest_input, read_shape
from fedsim.families.family import HeadBias, Role
from fedsim.families.family_catalogue import family_names, family_of, find_family, register_family
from fedsim.families.llama import LLAMA
from fedsim.families.mpnet import MPNET
from fedsim.families.roberta import ROBERTA

PACKAGE = Path(fedsim.__file__).parent
SETTING = StepSetting(batch_size=2, seq_len=16)


def texts_of(path: Path) -> set[str]:
    """All string constants of a file but its docstrings, and the pieces of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    standing_alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in standing_alone
    }


def compared_attributes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    sides = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    return {side.attr for side in sides if isinstance(side, ast.Attribute)}


def test_no_module_outside_the_families_names_one_or_compares_types():
    """Facts are looked up in the family; a name that stands elsewhere is the beginning of an `if`."""
    files = [path for path in PACKAGE.rglob("*.py") if "families" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 100
    names = {*family_names(), *(find_family(name).title for name in family_names())}
    for path in files:
        assert not texts_of(path) & names, path
        assert not compared_attributes(path) & {"architecture", "model_type", "title"}, path
    assert "llama" in texts_of(PACKAGE / "families" / "llama.py")  # the search does find them


def test_who_predicts_the_next_token():
    assert family_names(causal=True) == ("llama", "qwen2")
    assert family_names(causal=False) == ("bert", "roberta", "distilbert", "mpnet")
    assert family_names() == ("bert", "roberta", "distilbert", "mpnet", "llama", "qwen2")
    for name in family_names():
        assert find_family(name).gated == find_family(name).causal
    assert find_family("t5") is None
    assert find_family(None) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"linears": {}}, "linears must be given for"),
        ({"pooled": "last", "head_bias": MPNET.head_bias}, "goes with the first token"),
    ],
)
def test_records_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(ROBERTA, **changes)


def test_names_are_taken_once():
    register_family(LLAMA)  # the same again is nothing new
    with pytest.raises(ValueError, match="there is a family 'llama' already"):
        register_family(dataclasses.replace(LLAMA, title="Other"))
    with pytest.raises(ValueError, match="there is a shape 'tinyllama-1.1b' already"):
        register_family(dataclasses.replace(LLAMA, name="other"))
    (mine,) = (dataclasses.replace(shape, name="mine") for shape in LLAMA.shapes[:1])
    with pytest.raises(ValueError, match="shape 'mine' is of another family"):
        register_family(dataclasses.replace(LLAMA, name="other", shapes=(mine,)))
    assert find_family("other") is None


# -- config.json ------------------------------------------------------------------------------------------------------

DISTIL = {
    "model_type": "distilbert",
    "dim": 48,
    "n_heads": 6,
    "n_layers": 3,
    "hidden_dim": 100,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 56,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 100,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def test_distilberts_own_words_for_widths(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DISTIL))
    shape = load_shape(str(tmp_path), labels=5)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn) == (3, 48, 6, 6, 8, 100)
    assert (shape.positions, shape.pooler_width, shape.gated, shape.tied) == (64, 48, False, False)
    (tmp_path / "config.json").write_text(json.dumps({**DISTIL, "hidden_dim": None}))
    with pytest.raises(ModelError, match="hidden_dim = None"):
        load_shape(str(tmp_path))


def test_qwen2_groups_its_queries(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape = load_shape(str(tmp_path), labels=0)
    assert (shape.heads, shape.head_groups, shape.head_dim, shape.positions) == (14, 2, 4, 0)
    assert (shape.gated, shape.tied, shape.is_language_model) == (True, True, True)


def test_mean_pooling_needs_no_dense_layer():
    family = family_in(DISTIL, "model 'x'")
    assert read_shape(family, DISTIL, "x", "model 'x'", 3, "mean").pooler_width == 0


def test_longest_inputs():
    """Positions, less what counting from a padding token leaves unused; never beyond a sliding window."""
    assert longest_input(find_family("bert"), {"max_position_embeddings": 512, "pad_token_id": 7}) == 512
    assert longest_input(ROBERTA, {"max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert longest_input(ROBERTA, {"max_position_embeddings": 514, "pad_token_id": None}) == 513
    assert longest_input(MPNET, {"max_position_embeddings": 514, "pad_token_id": 0}) == 512
    qwen = find_family("qwen2")
    assert longest_input(qwen, {"max_position_embeddings": 64, "sliding_window": None}) == 64
    assert longest_input(qwen, {"max_position_embeddings": 64, "sliding_window": 16}) == 16


def test_an_encoder_as_a_decoder_is_refused():
    with pytest.raises(ModelError, match="mpnet as a decoder is not supported"):
        family_in({"model_type": "mpnet", "is_decoder": True}, "model 'x'")
    assert family_in({"model_type": "llama", "is_decoder": True}, "model 'x'") is LLAMA


# -- the clock --------------------------------------------------------------------------------------------------------


def ones(shape):
    return np.ones(shape.layers), np.ones(shape.layers)


def test_a_bias_by_head_is_passes_over_the_scores_and_a_launch_per_layer():
    """Against RoBERTa at MPNet's widths, forward: 3 passes over the scores and one launch a layer more."""
    mpnet = load_shape("mpnet-base")
    roberta = dataclasses.replace(mpnet, architecture="roberta")
    forward = StepSetting(batch_size=2, seq_len=16, tuning="inference")
    more, less = (step_work(shape, *ones(shape), 4, forward) for shape in (mpnet, roberta))
    assert more.launches - less.launches == mpnet.layers
    scores = 2 * 16 * 16 * mpnet.heads
    assert more.memory_bytes - less.memory_bytes == pytest.approx(4 * 3 * scores * mpnet.layers)
    assert more.flops == less.flops
    trained = [step_work(shape, *ones(shape), 4, SETTING).launches for shape in (mpnet, roberta)]
    assert trained[0] - trained[1] == pytest.approx((1 + 1.8) * mpnet.layers)


def test_qwen2s_biases_are_held_in_memory_for_the_heads_that_are_kept():
    qwen = load_shape("qwen2-0.5b")
    llama = dataclasses.replace(qwen, architecture="llama")
    for share in (1.0, 0.5):
        heads = np.full(qwen.layers, share)
        more, less = (
            memory_parts(shape, kept_sums(shape, SETTING, heads, np.ones(shape.layers)), 4, SETTING)[0]
            for shape in (qwen, llama)
        )
        assert more - less == pytest.approx(4 * share * qwen.layers * (896 + 2 * 128))


def test_every_familys_shapes_are_its_own():
    for name in family_names():
        family = find_family(name)
        assert family.shapes
        for shape in family.shapes:
            assert family_of(shape) is family
            assert (shape.pooler_width > 0) == (family.dense is not None)
        assert (Role.GATE in family.linears) == family.shapes[0].gated
    assert isinstance(MPNET.head_bias, HeadBias)
