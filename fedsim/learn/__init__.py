"""Real learning: LoRA, structured pruning, importance, aggregation, evaluation."""

import os

# Each new shape of a pruned layer leaves a compiled product in oneDNN's cache, a thousand of them by default: memory
# would grow round by round. Read when torch loads, which only this part does; what a user has set stays.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")
