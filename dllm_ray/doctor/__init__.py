"""Looks over an environment or a cluster before work is given to it, and says what to mend.

`probe.py` is what nodes are asked, `nodes.py`, `network.py` and `storage.py` ask them, `judge.py` makes findings of the
answers, `run.py` is all of it in turn.
"""
