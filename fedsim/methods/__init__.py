"""Federated methods: one file each, and the strategy that plays them."""
