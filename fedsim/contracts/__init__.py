"""Who meets whom: frozen records and Protocols. Nothing here computes."""
