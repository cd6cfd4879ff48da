"""How long a pruned model takes to answer beside the whole one, measured on this host.

    python experiments/inference/measure.py RUN [--batch-size 32] [--tokens 64] [--turns 9]

RUN is a finished run that trained and pruned. Its consensus is exported twice, LoRA merged into the weights: `dense`,
whose zeros cost as much as any weight (so it stands for the model before pruning), and `sliced`. Both get the same
batches of random tokens without padding, in turns, on one torch thread; a ratio is that of one turn, by processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import fedsim
from fedsim.errors import FedsimError
from fedsim.learn.export.exported import Exported, load_exported

BATCHES = 8


def seconds(exported: Exported, batches: list[torch.Tensor]) -> float:
    """Processor seconds of a pass over all batches, each ``(batch, tokens)``."""
    start = time.process_time()
    with torch.no_grad():
        for ids in batches:
            exported.model(ids, torch.ones_like(ids))
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Processor time of a sliced model over that of the dense one.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for style in ("dense", "sliced"):
            try:
                fedsim.export_run(options.run, Path(folder) / style, consensus=True, format=style, merge=True)
                models[style] = load_exported(Path(folder) / style)
            except FedsimError as error:
                print(f"measure.py: error: {error}", file=sys.stderr)
                return 2
    draw = torch.Generator().manual_seed(0)
    size = (options.batch_size, options.tokens)
    batches = [torch.randint(len(models["dense"].tokenizer), size, generator=draw) for _ in range(BATCHES)]
    for model in models.values():
        seconds(model, batches)  # the first pass pays for allocations
    turns = np.array([[seconds(models[style], batches) for style in ("sliced", "dense")] for _ in range(options.turns)])
    ratios = turns[:, 0] / turns[:, 1]
    removed = models["sliced"].facts.prune_ratio
    print(f"{options.run}: {100 * removed:.1f}% of the prunable weights removed, {size[0]} x {size[1]} tokens a batch")
    sliced_s, dense_s = np.median(turns, axis=0) / BATCHES
    print(f"a batch: sliced {sliced_s:.3f} s, dense {dense_s:.3f} s; medians of {options.turns} turns")
    print(f"sliced over dense: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
