"""`stack` (FLoRA, arXiv 2409.05976): clients' factors one beside another, and the product merged into the base.

With ``A = [w_1 A_1; w_2 A_2; ...]`` and ``B = [B_1, B_2, ...]`` the product ``c B A`` is the weighted mean of the
updates without any truncation, whatever the ranks. It goes into the frozen weights, and the next round's LoRA starts
afresh: the global factors are left with rank 0, so that every client draws its own rows of ``A`` (Kaiming, from its
stream of that round) and has ``B = 0`` (see `fedsim.learn.model.adapter.restrict`).

What was merged so far is one full matrix per Linear (`fedsim.learn.model.adapter.Adapter.merged`): it belongs to the
global state, travels with each job, and is in every checkpoint (340 MB for roberta-base). What its broadcast costs is
`fedsim.federation.broadcast`.

Unspecified in the source, which knows no pruned backbones; we chose: a row or column is averaged over the clients that
kept it, and nothing is merged into what nobody kept.
"""

from __future__ import annotations

from fedsim.learn.merge.coverage import sides
from fedsim.learn.merge.merging import Merging
from fedsim.learn.model.adapter import Adapter, Factors
from fedsim.learn.model.linears import COLUMN_PRUNED


def stack(merging: Merging) -> Adapter:
    """Merge the stacked updates into the base; the result's factors have rank 0. See the module."""
    previous = merging.previous
    factors: dict[str, Factors] = {}
    merged = dict(previous.merged)
    for linear, coverage in merging.covered():
        transposed, (a, b) = linear.role in COLUMN_PRUNED, previous.factors[linear.name]
        old_pruned, old_whole = sides((a, b), transposed)
        mean = old_pruned.new_zeros((old_pruned.shape[0], old_whole.shape[1]))
        for chunk in coverage.chunks:
            mean.addmm_(*merging.concatenated(linear, chunk))
        mean *= coverage.reciprocal * merging.alpha_over_rank
        update = (mean.T if transposed else mean).contiguous()
        merged[linear.name] = merged[linear.name] + update if linear.name in merged else update
        factors[linear.name] = a.new_empty((0, a.shape[1])), b.new_empty((b.shape[0], 0))
    return Adapter(factors, merging.mean_head(), merged)
