"""The server's merge of updates."""
