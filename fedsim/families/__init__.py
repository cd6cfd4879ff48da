"""Backbone families: what is known of each kind of transformer, one file per family, without any tensor library."""
