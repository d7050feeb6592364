"""Data: sources -> conversations -> token rows -> global batches. Ray appears in `mixture` only."""
