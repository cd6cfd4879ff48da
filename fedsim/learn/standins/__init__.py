"""Learners that train nothing: timing only, and the surrogate."""
