"""Token ids -> the text that a viewer shows for each of them.

A token is no letter: byte-level vocabularies split a character's UTF-8 over several tokens, and word pieces read
differently after a word than alone. So a canvas is spelled in runs between masks, not token by token.
"""

from collections.abc import Sequence

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.output import printable

MASK, END, LINE_BREAK = "░", "∎", "⏎"
"""How masks, ends of text and line breaks are drawn."""

_LONGEST_GROUP = 12  # tokens; one may end in the middle of a character, and so may those after it
_BROKEN = "\ufffd"


class Speller:
    """Spells canvases of one model; what it found is kept, as neighbouring steps share most of their tokens.

    Args:
        tokenizer: of the model.
        spec: knows the mask token and the tokens that end a text.
    """

    def __init__(self, tokenizer, spec: DiffusionSpec):
        self._tokenizer = tokenizer
        self._drawn = dict.fromkeys(spec.stop_token_ids, END)
        if spec.mask_token_id is not None:
            self._drawn[spec.mask_token_id] = MASK
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; together they read as the canvas does.

        A character that several tokens make is the text of the first of them, and the others' is empty. Masks and ends
        of text are drawn as `MASK` and `END`, control characters as pictures of them.
        """
        texts = [self._drawn.get(token, "") for token in tokens]
        before: tuple[int, ...] = ()
        position = 0
        while position < len(tokens):
            if tokens[position] in self._drawn:
                before, position = (), position + 1
                continue
            group, text = self._group(before, tokens[position : position + _LONGEST_GROUP])
            texts[position] = printable(text)
            before = () if _BROKEN in text else group
            position += len(group)
        return texts

    def _group(self, before: tuple[int, ...], following: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The fewest of the next tokens that make whole characters, and their text; one token where none do."""
        alone = ""
        for size in range(1, len(following) + 1):
            if following[size - 1] in self._drawn:
                break
            group = tuple(following[:size])
            text = self._text(before, group)
            if _BROKEN not in text:
                return group, text
            alone = alone or text
        return tuple(following[:1]), alone

    def _text(self, before: tuple[int, ...], group: tuple[int, ...]) -> str:
        text = self._known.get((before, group))
        if text is None:
            start, whole = self._decode(before), self._decode(before + group)
            text = whole[len(start) :] if whole.startswith(start) else self._decode(group)
            self._known[before, group] = text
        return text

    def _decode(self, tokens: tuple[int, ...]) -> str:
        if not tokens:
            return ""
        # cleaning up spaces would change text that was spelled already
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
