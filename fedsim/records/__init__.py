"""The records of a run: columns, folder, writer, reader, checkpoints."""
