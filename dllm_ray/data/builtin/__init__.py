"""Generated instruction data, `builtin:NAME[split:rows]`: endless, the same for the same seed, with checkable
answers."""

from types import ModuleType

from dllm_ray.data.builtin import digits, lengths

SETS: dict[str, ModuleType] = {"digits": digits, "lengths": lengths}
"""Name -> module with `rows(split, start, stop, seed)` and `is_correct(prompt, answer)`."""
