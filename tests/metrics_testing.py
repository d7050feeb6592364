"""Metrics that keep what they are told."""

from collections import defaultdict

from dllm_ray import metrics


def record(monkeypatch) -> dict[str, list]:
    """Puts recorders in the place of Ray's metrics; returns name -> (value, own tags), as they are told."""
    told: dict[str, list] = defaultdict(list)

    class Recorder:
        def __init__(self, name, description, *_bounds, tag_keys):
            self.name, self.tag_keys, self.default = name, set(tag_keys), {}

        def set_default_tags(self, tags):
            self.default = tags

        def tell(self, value, tags=None):
            assert self.default.keys() | (tags or {}).keys() == self.tag_keys
            assert isinstance(value, int | float)
            told[self.name].append((value, dict(tags or {})))

        set = observe = tell

        def inc(self, value, tags=None):
            assert value > 0
            self.tell(value, tags)

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorder)
    return told
