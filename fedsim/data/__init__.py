"""Labelled text from local files, hub names or the built-in language, and its split over clients."""
