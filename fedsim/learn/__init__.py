"""Real learning: LoRA, structured pruning, importance, aggregation, evaluation."""
