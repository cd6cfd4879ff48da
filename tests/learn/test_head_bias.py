"""MPNet's bias on attention: a pruned head drops its own column of the table, in every block by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_toys import export, random_adapter, uneven
from transformers import AutoConfig, AutoModel

from fedsim.learn.model.slicing import apply_structure
from fedsim.structure import Structure

TABLE = "encoder.relative_attention_bias"


def test_the_columns_of_pruned_heads_alone_lose_their_say(make_backbone, padded_batch):
    """A change of the table shows where some block keeps that head, and nowhere else."""
    backbone = make_backbone("mpnet")
    structure = Structure.full(backbone.shape)
    structure.head_mask[:] = [[True, False, False, True], [False, False, True, True]]
    apply_structure(backbone, structure)
    table = backbone.encoder.get_submodule(TABLE).weight
    with torch.no_grad():
        before = backbone.model(**padded_batch)
        for head, kept in enumerate(structure.head_mask.any(axis=0)):
            table[:, head] += torch.linspace(-1, 1, len(table), dtype=table.dtype)
            after = backbone.model(**padded_batch)
            table[:, head] -= torch.linspace(-1, 1, len(table), dtype=table.dtype)
            assert torch.allclose(after, before, rtol=0, atol=1e-9) != kept, head


def test_all_heads_again_is_the_library_itself(make_backbone, tiny_folders, padded_batch):
    backbone = make_backbone("mpnet", pooling="mean")
    theirs = AutoModel.from_pretrained(tiny_folders["mpnet"]).double().eval()
    structure = Structure.full(backbone.shape)
    structure.head_mask[:, 1] = False
    apply_structure(backbone, structure)
    apply_structure(backbone, Structure.full(backbone.shape))
    with torch.no_grad():
        ours = backbone.encoder(**padded_batch).last_hidden_state
        assert torch.equal(ours, theirs(**padded_batch).last_hidden_state)


def test_the_table_is_frozen_and_not_counted(make_backbone):
    backbone = make_backbone("mpnet")
    table = backbone.encoder.get_submodule(TABLE).weight
    assert not table.requires_grad
    assert table.shape == (32, 4)


@pytest.mark.parametrize("merged", [False, True])
def test_a_small_export_says_which_heads_it_keeps(make_backbone, tmp_path, merged):
    backbone = make_backbone("mpnet", dtype=torch.float32)
    structure = uneven(backbone.shape)
    folder = export(tmp_path / "e", backbone, random_adapter(backbone), structure, "native", "sliced", merged)
    config = AutoConfig.from_pretrained(folder)
    assert config.kept_head_places == [np.flatnonzero(mask).tolist() for mask in structure.head_mask]
    assert config.kept_head_places[0] != list(range(len(config.kept_head_places[0])))  # not merely the first ones
