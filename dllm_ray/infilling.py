"""Text with gaps -> token ids: `[MASK]` stands for one token to fill in, `[MASK:8]` for eight."""

import re

from dllm_ray.chat import encode_plain
from dllm_ray.errors import DataError

_GAP = re.compile(r"\[MASK(?::([0-9]+))?\]")
_LONGEST = 1_000_000  # a slip of the finger must not fill the memory


def has_gaps(text: str) -> bool:
    """Whether anything is to be filled in."""
    return _GAP.search(text) is not None


def encode_gaps(tokenizer, mask_token_id: int, text: str) -> list[int]:
    """Token ids of a text, with as many mask tokens at each gap as it asks for; `Sampler.infill` fills them.

    Text that looks like a control token stays text, the mask token's own included.

    Raises:
        DataError: a gap of no token, or of more than a million.
    """
    texts, gaps = split_gaps(text)
    ids = encode_plain(tokenizer, texts[0])
    for gap, following in zip(gaps, texts[1:], strict=True):
        ids += [mask_token_id] * gap + encode_plain(tokenizer, following)
    return ids


def split_gaps(text: str) -> tuple[list[str], list[int]]:
    """The texts around the gaps, one more than there are gaps, and how many tokens each gap has.

    Raises:
        DataError: a gap of no token, or of more than a million.
    """
    texts, gaps, end = [], [], 0
    for gap in _GAP.finditer(text):
        texts.append(text[end : gap.start()])
        gaps.append(_count(gap))
        end = gap.end()
    return [*texts, text[end:]], gaps


def _count(gap: re.Match) -> int:
    # longer than any number that may be meant, it need not be read
    count = 1 if gap[1] is None else int(gap[1]) if len(gap[1]) < 20 else _LONGEST + 1
    if not 1 <= count <= _LONGEST:
        raise DataError(f"{gap[0][:40]}: a gap has between 1 and {_LONGEST:,} tokens")
    return count
