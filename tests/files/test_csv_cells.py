"""Tables that a spreadsheet opens: a name of a user's own is never a formula."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from fedsim.text import csv_text, spreadsheet_safe


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_get_an_apostrophe(text):
    frame = pd.DataFrame({"method": [text, "fedlora"], "=x": [-1.5, 2.0]})
    written = csv_text(frame)
    assert str(spreadsheet_safe(text)).startswith("'")
    read = pd.read_csv(io.StringIO(written, newline=""))
    assert read["method"][0].startswith("'")
    assert read["'=x"].tolist() == [-1.5, 2.0]
    assert frame.columns.tolist() == ["method", "=x"]


def test_numbers_and_plain_texts_stay_as_they_are():
    frame = pd.DataFrame({"a": [-1, 2], "b": ["x", None], "c": [np.nan, -0.25], "d": [True, False]})
    assert csv_text(frame) == frame.to_csv(index=False, lineterminator="\n")
