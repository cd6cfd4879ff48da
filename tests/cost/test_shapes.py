"""Shapes: built in, from a folder, and the sentences for what cannot be read."""

import json

import pytest

from fedsim.cost.shapes import built_in_shapes, load_shape
from fedsim.errors import ModelError

# Total parameters as the models' papers and cards state them, in millions.
STATED_MILLIONS = {
    "bert-base": 110,
    "bert-large": 335,
    "roberta-base": 125,
    "roberta-large": 355,
    "minilm-l6": 22.7,
    "minilm": 22.7,
    "tinyllama-1.1b": 1034,  # 1,100 with the output embedding, which a classifier has not
    "llama-7b": 6607,  # 6,738 likewise
    "distilbert-base": 66,
    "mpnet-base": 109,
    "smollm2-135m": 134.5,
    "qwen2-0.5b": 494,
}


def write_config(folder, **changes):
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 100,
        "vocab_size": 50,
        "max_position_embeddings": 128,
    }
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", built_in_shapes())
def test_built_in_shape_has_the_stated_size(name):
    shape = load_shape(name)
    assert (shape.prunable_weights + shape.embedding_weights) / 1e6 == pytest.approx(STATED_MILLIONS[name], rel=0.02)


def test_tied_shapes_have_every_weight_of_the_published_models():
    """Blocks, embeddings, norms and biases, one by one: the sums that the checkpoints have."""
    for name, layers, biases, published in (
        ("smollm2-135m", 30, 0, 134_515_008),
        ("qwen2-0.5b", 24, 896 + 2 * 128, 494_032_768),
    ):
        shape = load_shape(name, labels=0)
        assert shape.all_weights + (2 * layers + 1) * shape.hidden + layers * biases == published
    # Without a pooler; with the 32 x 12 numbers of the table that MPNet looks distances up in.
    bert_like = (("distilbert-base", 66_362_880, 0), ("mpnet-base", 108_895_872, 384))
    for name, published, distances in bert_like:
        shape = load_shape(name)
        small = shape.layers * (9 * shape.hidden + shape.ffn) + 2 * shape.hidden + distances
        assert shape.prunable_weights + shape.embedding_weights + small == published


def test_who_has_a_dense_layer_in_its_head():
    for name in ("distilbert-base", "mpnet-base"):
        assert load_shape(name, labels=3).head_weights == 768 * 769 + 3 * 769
    assert load_shape("roberta-base", labels=3).head_weights == 768 * 769 + 3 * 769
    assert load_shape("bert-base", labels=3).head_weights == 3 * 769
    assert load_shape("llama-7b").pooler_width == 0


def test_folder_with_grouped_queries(tmp_path):
    shape = load_shape(write_config(tmp_path), labels=5)
    assert (shape.head_groups, shape.head_dim, shape.ffn, shape.positions, shape.labels) == (2, 8, 100, 0, 5)


def test_folder_of_bert_ignores_llama_keys(tmp_path):
    shape = load_shape(write_config(tmp_path, model_type="bert", num_key_value_heads=None))
    assert (shape.kv_heads, shape.positions, shape.pooler_width) == (6, 128, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "t5"}, "of type 't5' (allowed types: bert, roberta, distilbert, mpnet, llama, qwen2)"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"intermediate_size": "wide"}, "intermediate_size = 'wide'"),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
    ],
)
def test_unusable_config_is_one_sentence(tmp_path, changes, said):
    with pytest.raises(ModelError) as caught:
        load_shape(write_config(tmp_path, **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_or_with_broken_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_shape(str(tmp_path))


def test_unknown_name_is_one_sentence_with_the_nearest(monkeypatch):
    import huggingface_hub

    def unreachable(*_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ModelError, match="did you mean 'roberta-base'") as caught:
        load_shape("roberta-bsae")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="is not a folder"):
        load_shape("/nowhere/at/all")
