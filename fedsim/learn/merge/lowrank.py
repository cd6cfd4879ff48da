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
_PRODUCT, _GRAM, _QR, _EIGH = 2.0, 1.2, 7.4, 27.0
"""Cost of a float64 product, Gram matrix (half of it), QR and eigendecomposition (per cubed width), in the time of a
float32 product's flop, for the nominal flops of Golub and Van Loan, Matrix Computations. Measured on one AVX2 core at
widths 64 to 3072, but for the QR: fitted, so that the rule turns where the two measured routes cross, at a rank sum of
0.75 to 0.83 of the narrow width for all shapes tried (64 x 64 to 3072 x 768)."""
_GRAM_BLOCK = 96
"""Columns per block of a Gram matrix (96 was fastest of 64 to 256)."""
_NEAR_TIE = 1.0 - 1e-3
"""Entries within this share of the largest count as largest, or rounding would choose the sign between equals."""

FactorPair = tuple[torch.Tensor, torch.Tensor]
"""``(B, A)``: ``B (d_out, rank)`` and ``A (rank, d_in)``."""


def factored_is_cheaper(d_out: int, d_in: int, rank_sum: int) -> bool:
    """Whether `truncated_svd_factored` takes less time than building the matrix and `truncated_svd_dense`.

    With m <= M the two widths and R the concatenated rank: dense builds the matrix (float32), its Gram matrix and m
    eigenvectors; factored takes the QR of the narrow side, moves its core to the wide side, and needs the Gram matrix
    and eigenvectors of width R. Always false from R = m on, so that factors concatenated for the cheaper route are no
    larger than twice the matrix.
    """
    narrow, wide = min(d_out, d_in), max(d_out, d_in)
    if rank_sum >= narrow:
        return False
    dense = 2.0 * wide * narrow * (rank_sum + _GRAM * narrow) + _EIGH * narrow**3
    orthogonal = _QR * (4.0 * narrow - 4.0 / 3.0 * rank_sum) * rank_sum**2
    factored = orthogonal + 2.0 * (_PRODUCT + _GRAM) * wide * rank_sum**2 + _EIGH * rank_sum**3
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


def with_old_rows(a: torch.Tensor, b: torch.Tensor, old_a: torch.Tensor) -> torch.Tensor:
    """``A`` with the rows of `old_a` in components that are not there (zero in ``B``): the product stays.

    A device that gets them can train them; with both zero they would never get a gradient.
    """
    end = min(len(a), len(old_a))
    a[:end] = torch.where(b[:, :end].any(dim=0).unsqueeze(1), a[:end], old_a[:end])
    return a


def _decompose(matrix: torch.Tensor, rank: int) -> FactorPair:
    """Evenly split factors with at most `rank` components, descending, signs as they come."""
    wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.T if wide else matrix
    _, vectors = torch.linalg.eigh(_lower_gram(tall))
    keep = min(rank, vectors.shape[1])
    vectors = vectors[:, -keep:].flip(1)
    # Norms of the projections, not roots of the eigenvalues: as accurate as the product itself.
    scores = tall @ vectors
    values = torch.linalg.vector_norm(scores, dim=0)
    present = values > NEGLIGIBLE * torch.linalg.vector_norm(values, ord=torch.inf)
    roots = torch.where(present, values, torch.ones_like(values)).sqrt()
    tall_factor = scores / roots * present
    narrow_factor = vectors * roots * present
    return (narrow_factor, tall_factor.T) if wide else (tall_factor, narrow_factor.T)


def _lower_gram(tall: torch.Tensor) -> torch.Tensor:
    """``tall' tall`` on and below the diagonal, which is all that `torch.linalg.eigh` reads; what is above is open."""
    width = tall.shape[1]
    gram = tall.new_zeros((width, width))
    for start in range(0, width, _GRAM_BLOCK):
        columns = slice(start, start + _GRAM_BLOCK)
        gram[start:, columns] = tall[:, start:].T @ tall[:, columns]
    return gram


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
