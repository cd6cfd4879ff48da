"""Which device made each round as long as it was, and whether its computing or its link did.

The *critical* client of a round is the last to finish, of those the server waited for (outcomes ok and late; the others
where there are none). A deadline that cuts several clients at once names the one with the lowest number.

*Cause* [ours]: what the critical client has beyond the round's median client. Its wait, its computing and its link
(download and upload) are compared with the medians over the same clients; the largest excess is the cause. A slow
device with a slow link can so be told from one with little of either, where everyone's link is slow.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

CAUSES = ("compute", "link", "wait")
_WAITED_FOR = ("ok", "late")


def critical_path(client_rounds: pd.DataFrame) -> pd.DataFrame:
    """The critical client of every round.

    Args:
        client_rounds: records of one run.
    Returns:
        A row per round with participants: ``round client device mode outcome busy_s median_busy_s wait_excess_s
        compute_excess_s link_excess_s cause``; `busy_s` is from the round's opening to the client's last activity.
    """
    rows = client_rounds[["round", "client", "device", "mode", "outcome"]].copy()
    rows["wait_s"] = client_rounds["wait_s"]
    rows["compute_s"] = client_rounds["compute_s"]
    rows["link_s"] = client_rounds["download_s"] + client_rounds["upload_s"]
    rows["busy_s"] = rows["wait_s"] + rows["compute_s"] + rows["link_s"]
    waited_for = rows["outcome"].isin(_WAITED_FOR)
    rows = rows[waited_for | ~waited_for.groupby(rows["round"]).transform("any")]
    quantities = ["busy_s", *(f"{cause}_s" for cause in CAUSES)]
    medians = rows.groupby("round")[quantities].transform("median").add_prefix("median_")
    rows = rows.join(medians)
    for cause in CAUSES:
        rows[f"{cause}_excess_s"] = rows[f"{cause}_s"] - rows[f"median_{cause}_s"]
    # The highest busy_s, ties to the lowest client.
    rows = rows.sort_values(["round", "busy_s", "client"], ascending=[True, False, True])
    last = rows.drop_duplicates("round").reset_index(drop=True)
    excess = last[[f"{cause}_excess_s" for cause in CAUSES]].to_numpy()
    last["cause"] = pd.Series(np.array(CAUSES)[excess.argmax(axis=1)] if len(last) else [], dtype=object)
    columns = ["round", "client", "device", "mode", "outcome", "busy_s", "median_busy_s"]
    return last[[*columns, *(f"{cause}_excess_s" for cause in ("wait", "compute", "link")), "cause"]]
