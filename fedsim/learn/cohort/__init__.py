"""Many clients trained at once over one frozen backbone; results as of the reference trainer, to rounding."""
