"""Policies that pick pruning ratio and LoRA rank, vectorised over clients, and the reward."""
