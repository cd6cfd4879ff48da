"""The simulated devices and their links."""
