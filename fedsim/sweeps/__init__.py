"""Sweeps: many runs from one command, on this computer or on a Ray cluster."""
