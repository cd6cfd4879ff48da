"""The fingerprint of a corpus, for the manifest of a run."""

from __future__ import annotations

import hashlib

import numpy as np

from fedsim.data.labelled import Corpus, LabelledText


def _feed(digest: hashlib._Hash, strings: tuple[str, ...] | None) -> None:
    # Lengths go in with the bytes, so that no two different lists feed the same stream; -1 says "no such column".
    digest.update(b"-1;" if strings is None else f"{len(strings)};".encode())
    for string in strings or ():
        encoded = string.encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(encoded)}:".encode())
        digest.update(encoded)


def _feed_text(digest: hashlib._Hash, part: LabelledText) -> None:
    for strings in (part.texts, part.pairs, part.fields):
        _feed(digest, strings)
    digest.update(np.ascontiguousarray(part.labels, dtype="<i8").tobytes())
    if part.responses is not None:  # only then, so that a classification corpus keeps the hash it always had
        digest.update(b"responses;")
        _feed(digest, part.responses)


def corpus_hash(corpus: Corpus) -> str:
    """SHA-256 (64 hexadecimal digits) over texts, pairs, fields, labels, responses and label names, order included."""
    digest = hashlib.sha256()
    _feed_text(digest, corpus.train)
    _feed_text(digest, corpus.test)
    _feed(digest, corpus.label_names)
    return digest.hexdigest()
