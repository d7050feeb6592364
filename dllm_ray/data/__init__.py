"""Data: sources -> conversations or documents -> token rows -> one blended stream -> global batches.

Ray appears in `server` and `mixture` only.
"""
