"""What is asked of finished runs: comparison, diagnosis, regret, surrogate fits, exports."""
