"""What a test registers is gone again after it: other tests count what there is."""

import pytest

from fedsim.learn.entries import OBJECTIVES
from fedsim.runner.names import CATALOGUES


@pytest.fixture(autouse=True)
def forget():
    catalogues = [*CATALOGUES.values(), OBJECTIVES]
    before = [dict(catalogue) for catalogue in catalogues]
    yield
    for catalogue, entries in zip(catalogues, before, strict=True):
        catalogue.clear()
        catalogue.update(entries)
