"""One run: configuration, parts, the run itself, progress, trackers."""
