"""The built-in language: its rules hold, and counting words is not enough."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from fedsim.data import synthetic
from fedsim.data.corpus import load_corpus
from fedsim.data.fingerprint import corpus_hash
from fedsim.settings import DataSettings

SETTINGS = DataSettings(name="synthetic")
OPINION_WORDS = {*synthetic._POSITIVE, *synthetic._NEGATIVE}


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(SETTINGS, seed=0)


def counts(texts):
    """Word counts, shape (texts, words)."""
    column = {word: index for index, word in enumerate(synthetic.vocabulary())}
    pairs = [(row, column[word]) for row, text in enumerate(texts) for word in text.split()]
    rows, columns = zip(*pairs, strict=True)
    return csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(texts), len(column)))


def logistic_accuracy(train, train_labels, test, test_labels):
    sign = 2 * train_labels - 1

    def loss(weights):
        margin = (train @ weights) * sign
        gradient = train.T @ (-sign / (1 + np.exp(margin))) / len(sign)
        return np.logaddexp(0, -margin).mean() + 1e-5 * weights @ weights, gradient + 2e-5 * weights

    weights = minimize(loss, np.zeros(train.shape[1]), jac=True, method="L-BFGS-B").x
    return float((((test @ weights) > 0) == test_labels).mean())


def slow_label(text):
    """Read a sentence the slow way: the opinion of its last opinion clause, turned by a negator of that clause."""
    clauses = text.removesuffix(" .").replace(" but ", " | ").replace(" and ", " | ").replace(" , ", " | ").split(" | ")
    verdicts = []
    for clause in clauses:
        words = clause.split()
        loaded = [word for word in words if word in OPINION_WORDS]
        verbs = [word for word in words if any(word in verbs for verbs in synthetic._LIKING.values())]
        if not loaded and not verbs:
            continue  # neutral: its negator turns nothing
        last = verbs[0] if verbs else loaded[-1]
        positive = last in synthetic._POSITIVE or last in synthetic._LIKING[True]
        verdicts.append(positive != any(word in synthetic._NEGATORS for word in words))
    return verdicts[-1]


def test_labels_follow_the_rules_of_the_language(corpus):
    assert [slow_label(text) for text in corpus.test.texts] == corpus.test.labels.tolist()


def test_counting_words_stays_well_under_ninety_percent():
    """A logistic regression on word counts of 20,000 sentences, three times the corpus: what counting can give."""
    big = load_corpus(DataSettings(name="synthetic", max_samples=20_000), seed=0)
    accuracy = logistic_accuracy(counts(big.train.texts), big.train.labels, counts(big.test.texts), big.test.labels)
    assert 0.6 < accuracy < 0.86


def test_sizes_lengths_balance_and_vocabulary(corpus):
    words = set(synthetic.vocabulary())
    assert (len(corpus.train), len(corpus.test)) == (6_400, 800)
    assert len(words) == len(synthetic.vocabulary())
    assert all(len(text.split()) <= synthetic.MAX_WORDS for text in corpus.train.texts)
    assert {word for text in corpus.train.texts for word in text.split()} <= words
    assert 0.47 < corpus.train.labels.mean() < 0.53
    assert set(corpus.train.fields) == set(synthetic.topics())


def test_determiner_noun_and_verb_agree_in_number(corpus):
    plural_only, singular_only = {"these", "those", "were", "are"}, {"this", "that", "was", "is"}
    plural = {noun + "s" for topic in synthetic.topics() for noun in synthetic._nouns(topic)}
    singular = {noun for topic in synthetic.topics() for noun in synthetic._nouns(topic)}
    assert not plural & singular
    for text in corpus.train.texts[:1000]:
        for clause in text.replace(" but ", " | ").replace(" and ", " | ").replace(" , ", " | ").split(" | "):
            seen = set(clause.split())
            assert not (seen & plural and seen & singular_only)
            assert not (seen & singular and seen & plural_only)


def test_test_sentences_are_new_but_for_chance(corpus):
    known = set(corpus.train.texts)
    assert sum(text in known for text in corpus.test.texts) / len(corpus.test) < 0.01


def test_corpus_depends_on_the_seed_alone_and_a_small_one_begins_a_large_one(corpus):
    assert (
        corpus_hash(corpus) == corpus_hash(load_corpus(SETTINGS, seed=0)) != corpus_hash(load_corpus(SETTINGS, seed=1))
    )
    small = load_corpus(DataSettings(name="synthetic", max_samples=100), seed=0)
    assert small.train.texts == corpus.train.texts[:100]
    assert small.test.texts == corpus.test.texts


def test_unlabelled_text_is_seeded_fits_the_limit_and_keeps_to_the_vocabulary():
    text = synthetic.unlabelled_text(500, seed=0)
    assert text == synthetic.unlabelled_text(800, seed=0)[:500]
    assert text != synthetic.unlabelled_text(500, seed=1)
    assert all(len(sentence.split()) <= synthetic.MAX_WORDS for sentence in text)
    assert {word for sentence in text for word in sentence.split()} <= set(synthetic.vocabulary())
