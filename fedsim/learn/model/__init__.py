"""The frozen backbone, its slices and its LoRA."""
