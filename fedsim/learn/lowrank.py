"""The best low-rank approximation of an update, from the full matrix or from its factors.

Both routes give the same product ``B A`` (the truncated singular value decomposition, Eckart and Young, 1936), split
evenly, ``B = U sqrt(S)`` and ``A = sqrt(S) V'``, as FlexLoRA does (arXiv 2402.11505). What we chose:

* The decomposition is the eigendecomposition of the smaller Gram matrix, in float64. It costs a third of a float64
  SVD. Squaring loses half of the digits, which in float64 leaves 1e-8 of the largest singular value: less than the
  rounding of the float32 factors that come out. It is deterministic on one host and thread count.
* Components below ``NEGLIGIBLE`` of the largest are rounding, and come out as exact zeros in both factors, so that a
  receiver can tell which of the `rank` components are there.
* Signs: in every column of ``B`` the first entry among the largest in magnitude is positive. Equal singular values
  leave their vectors free to rotate; the product does not depend on it unless the truncation falls between them.
"""

from __future__ import annotations

import torch

NEGLIGIBLE = 4 * torch.finfo(torch.float32).eps
_EIGH_FLOPS = 9.0
"""Flops of a full symmetric eigendecomposition per cubed width (Golub and Van Loan, Matrix Computations, 8.3)."""
_NEAR_TIE = 1.0 - 1e-3
"""Entries within this share of the largest count as largest, or rounding would choose the sign between equals."""

FactorPair = tuple[torch.Tensor, torch.Tensor]
"""``(B, A)``: ``B (d_out, rank)`` and ``A (rank, d_in)``."""


def factored_is_cheaper(d_out: int, d_in: int, rank_sum: int) -> bool:
    """Whether `truncated_svd_factored` takes fewer flops than building the matrix and `truncated_svd_dense`.

    With m <= M the two widths and R the concatenated rank: dense 2 M m R (product) + 2 M m^2 (Gram) + 9 m^3;
    factored 4 m R^2 (QR of the narrow side) + 4 M R^2 (product and Gram of the wide side) + 9 R^3. Always false
    from R = m on, so that factors concatenated for the cheaper route are no larger than twice the matrix.
    """
    narrow, wide = min(d_out, d_in), max(d_out, d_in)
    dense = 2.0 * wide * narrow * (rank_sum + narrow) + _EIGH_FLOPS * narrow**3
    factored = 4.0 * (narrow + wide) * rank_sum**2 + _EIGH_FLOPS * rank_sum**3
    return factored < dense


def truncated_svd_dense(matrix: torch.Tensor, rank: int) -> FactorPair:
    """Factors of the best approximation of rank at most `rank`.

    Args:
        matrix: shape ``(d_out, d_in)``, finite.
        rank: components to return, >= 1; those beyond the matrix's own rank are zero.
    Returns:
        ``(B, A)`` with shapes ``(d_out, rank)`` and ``(rank, d_in)``, in the matrix's dtype, contiguous.
    """
    return _finish(*_decompose(matrix.double(), rank), rank, matrix.dtype)


def truncated_svd_factored(left: torch.Tensor, right: torch.Tensor, rank: int) -> FactorPair:
    """`truncated_svd_dense` of ``left @ right`` without building it.

    A QR decomposition of the narrow side moves everything else to the wide side, where one Gram matrix of the
    concatenated rank is left to decompose.

    Args:
        left, right: shapes ``(d_out, R)`` and ``(R, d_in)``, finite; any R >= 1.
        rank: as in `truncated_svd_dense`.
    Returns:
        As `truncated_svd_dense`.
    """
    dtype = left.dtype
    left, right = left.double(), right.double()
    if left.shape[0] <= right.shape[1]:
        basis, core = torch.linalg.qr(left)
        b, a = _decompose(core @ right, rank)
        return _finish(basis @ b, a, rank, dtype)
    basis, core = torch.linalg.qr(right.T)
    b, a = _decompose(left @ core.T, rank)
    return _finish(b, a @ basis.T, rank, dtype)


def _decompose(matrix: torch.Tensor, rank: int) -> FactorPair:
    """Evenly split factors with at most `rank` components, descending, signs as they come."""
    wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.T if wide else matrix
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    keep = min(rank, squares.numel())
    vectors = vectors[:, -keep:].flip(1)
    # Norms of the projections, not roots of the eigenvalues: as accurate as the product itself.
    scores = tall @ vectors
    values = torch.linalg.vector_norm(scores, dim=0)
    present = values > NEGLIGIBLE * torch.linalg.vector_norm(values, ord=torch.inf)
    roots = torch.where(present, values, torch.ones_like(values)).sqrt()
    tall_factor = scores / roots * present
    narrow_factor = vectors * roots * present
    return (narrow_factor, tall_factor.T) if wide else (tall_factor, narrow_factor.T)


def _finish(left: torch.Tensor, right: torch.Tensor, rank: int, dtype: torch.dtype) -> FactorPair:
    """Fix the signs, pad with zero components up to `rank` and go back to `dtype`."""
    size = left.abs()
    first = (size >= _NEAR_TIE * size.amax(dim=0)).to(torch.uint8).argmax(dim=0)
    signs = torch.where(left.gather(0, first.unsqueeze(0)).squeeze(0) < 0, -1.0, 1.0).to(left.dtype)
    b = torch.zeros((left.shape[0], rank), dtype=dtype, device=left.device)
    a = torch.zeros((rank, right.shape[1]), dtype=dtype, device=left.device)
    found = left.shape[1]
    b[:, :found] = left * signs
    a[:found] = right * signs.unsqueeze(1)
    return b, a
