"""Runs: configuration, run directories, checkpoints, results, comparison."""
