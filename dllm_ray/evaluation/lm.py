"""The lm-eval adapter: turns the harness's requests into token ids, and answers into text and log-likelihoods.

Who answers is not its business: it is given an `Answerer`, which may be a model in this process or a pool of Ray
workers. How long answers are and how they are drawn is the sampler's affair, as in the harnesses of the published
models: of a task's generation settings only `until` counts, not `max_gen_toks`, `temperature` or `do_sample`.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dllm_ray import chat
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation import registration
from dllm_ray.evaluation.answering import Answerer
from dllm_ray.evaluation.likelihood import Likelihood, Pair
from dllm_ray.evaluation.texts import require_likelihoods
from dllm_ray.models.spec import DiffusionSpec

_Pieces = list[tuple[str, bool]]  # a rendered conversation, see `chat.render`


class DiffusionHarness(LM):
    """A diffusion language model as lm-eval sees it.

    Args:
        answerer: answers requests, in order.
        tokenizer: of the model.
        spec: of the model.
        max_length: tokens in the model's context; None: unlimited.
        max_new_tokens: tokens that a written answer takes of the context.
        name: the model's name, for the harness's records.
        seed: every request's seed follows from it, from the request's tokens and from how often its document has asked
            them before, and from nothing else.
        sampler_seed: stands in its place for written answers; None: the same.
        until: strings that end a written answer, beside the task's own.
        escape_until: leave answers uncut by the task's own strings.
        add_bos_token: begin every prompt and every scored text with the model's BOS, where it has one.
    """

    def __init__(
        self,
        answerer: Answerer,
        tokenizer,
        spec: DiffusionSpec,
        max_length: int | None,
        max_new_tokens: int | None,
        name: str,
        seed: int = 0,
        until: Sequence[str] = (),
        escape_until: bool = False,
        add_bos_token: bool = False,
        sampler_seed: int | None = None,
    ):
        super().__init__()
        self.answerer = answerer
        """Who answers; holds the figures."""
        self.truncated = 0
        """Requests that were longer than the context, and lost their beginning."""
        self._tokenizer, self._spec, self._name, self._seed = tokenizer, spec, name, seed
        self._sampler_seed = seed if sampler_seed is None else sampler_seed
        self._max_length, self._max_new_tokens = max_length, max_new_tokens
        self._until, self._escape_until = tuple(until), escape_until
        self._bos = [spec.bos_token_id] if add_bos_token and spec.bos_token_id is not None else []
        self._chats: dict[str, _Pieces] = {}  # conversation as text -> the same, with control tokens told from text
        self._controls = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._ids = lru_cache(maxsize=1 << 16)(self._encode)  # the choices of a question share its context

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, cut at the first token that ends a text, and then before the first stop string.

        A prompt that leaves no room for its answer loses its beginning, and is counted.

        Raises:
            ConfigError: no prompt has room beside an answer.
        """
        prompts = [self._fitting(self._prompt(request.args[0])) for request in requests]
        seeds = self._seeds(requests, [(prompt,) for prompt in prompts], self._sampler_seed)
        texts = []
        for request, answer in zip(requests, self.answerer.generate(prompts, seeds), strict=True):
            text = self._text(answer.tokens, request.args[1].get("until"))
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy denoising would write it.

        Context and continuation are told apart as lm-eval does it: spaces at the context's end go to the continuation,
        and both are tokenized as one text. After an empty context comes BOS, or else EOS. Of what is longer than the
        model's context only the end counts; a continuation of no tokens is certain.

        Raises:
            ModelError: the model edits.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows, pairs = [], []
        for row, request in enumerate(requests):
            prefix, target = self._pair(*request.args[:2])
            if target:
                rows.append(row)
                pairs.append(self._fitting_pair(prefix, target))
        asked = [requests[row] for row in rows]
        sizes = [float(max(len(request.args[1].strip()), 1)) for request in asked]
        for row, found in zip(rows, self._score(asked, pairs, _questions(asked), sizes), strict=True):
            results[row] = (found.mean, found.greedy)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats, after BOS or else EOS.

        A text that is longer than the context is cut into windows, in which each token is scored once; the last one
        sees as much before its tokens as the context allows.

        Raises:
            ModelError: the model edits.
        """
        rows, pairs = [], []
        for row, request in enumerate(requests):
            for prefix, target in self._windows(self._ids(request.args[0])):
                rows.append(row)
                pairs.append((prefix, target))
        asked = [requests[row] for row in rows]
        alone = [[index] for index in range(len(rows))]
        sizes = [float(len(target)) for _, target in pairs]
        results = [0.0] * len(requests)
        for row, found in zip(rows, self._score(asked, pairs, alone, sizes), strict=True):
            results[row] += found.mean
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. It is also kept in a form in which what documents quote can't turn into control
        tokens when the harness hands the text back."""
        if add_generation_prompt:
            text = self._tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=True)
            pieces = chat.render(self._tokenizer, chat_history, add_generation_prompt=True)
        else:  # the answer's beginning is given
            text = self._tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
            safe = chat.shield(self._tokenizer, chat_history)
            pieces = [(self._tokenizer.apply_chat_template(safe, tokenize=False, continue_final_message=True), False)]
        self._chats[text] = pieces
        return text

    def _score(
        self, requests: Sequence[Instance], pairs: list[Pair], groups: list[list[int]], sizes: list[float]
    ) -> list[Likelihood]:
        require_likelihoods(self._spec)  # before any worker is asked
        return self.answerer.score(pairs, self._seeds(requests, pairs, self._seed), groups, sizes) if pairs else []

    @staticmethod
    def _seeds(requests: Sequence[Instance], ids: Sequence[Sequence[Sequence[int]]], seed: int) -> list[int]:
        """A seed for each request: of the same tokens each time, and another one for each repeat of the same request.
        lm-eval repeats a request by handing in the same object several times."""
        seen: Counter[Hashable] = Counter()
        seeds = []
        for request, parts in zip(requests, ids, strict=True):
            tokens = b"".join(len(part).to_bytes(8, "little") + array("q", part).tobytes() for part in parts)
            asked = (request.task_name, request.doc_id, request.idx, tokens)
            head = f"{seed} {seen[asked]} ".encode()
            seen[asked] += 1
            seeds.append(int.from_bytes(hashlib.sha256(head + tokens).digest()[:8], "little") >> 2)
        return seeds

    def _encode(self, text: str) -> list[int]:
        return chat.encode_text(self._tokenizer, text) if text else []

    def _prompt(self, context: str) -> list[int]:
        return self._with_bos(self._chat_ids(self._chats[context]) if context in self._chats else self._ids(context))

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else self._bos + ids

    def _chat_ids(self, pieces: _Pieces) -> list[int]:
        (encoded,) = chat.encode_pieces(self._tokenizer, [[piece for piece in pieces if piece[0]]])
        return encoded.ids

    def _fitting(self, prompt: list[int]) -> list[int]:
        """The end of a prompt that has room in the context beside an answer."""
        if self._max_length is None:
            return prompt
        room = self._max_length - (self._max_new_tokens or 1)
        if room < 1:
            raise ConfigError(
                f"{self._max_new_tokens} leaves no room for a prompt in the model's context of {self._max_length}",
                "sampler.max_new_tokens",
            )
        return self._end(prompt, room)

    def _pair(self, context: str, continuation: str) -> Pair:
        """Token ids of a context and of what follows it."""
        if not context:
            target = self._ids(continuation)
            start = self._start
            # a text that begins with the token itself is conditioned on it
            return (start, target[1:]) if len(target) > 1 and target[:1] == start else (start, target)
        given = context.rstrip()
        spaces = context[len(given) :]
        if context in self._chats:
            *before, (last, is_answer) = self._chats[context]
            prefix = self._chat_ids([*before, (last.rstrip(), is_answer)])
            added = last + chat.shield(self._tokenizer, continuation)
            whole = self._chat_ids([*before, (added, is_answer)])
        else:
            prefix, whole = self._ids(given), self._ids(context + continuation)
        target = whole[len(prefix) :] or self._ids(spaces + continuation)
        return self._with_bos(prefix) or self._start, target

    def _fitting_pair(self, prefix: list[int], target: list[int]) -> Pair:
        """The end of a pair that has room in the context; something is always given."""
        if self._max_length is None or len(prefix) + len(target) <= self._max_length:
            return prefix, target
        ids = self._end(prefix + target, self._max_length)
        given = max(len(ids) - len(target), 1)
        return ids[:given], ids[given:]

    def _end(self, ids: list[int], room: int) -> list[int]:
        """The end of what is too long, after the BOS that it should begin with; or all of it."""
        if len(ids) <= room:
            return ids
        self.truncated += 1
        return self._bos + ids[len(ids) - (room - len(self._bos)) :]

    def _windows(self, ids: list[int]) -> list[Pair]:
        longest = len(ids) if self._max_length is None else self._max_length - len(self._start)
        if not ids:
            return []
        return [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, self._start[0], longest, 1)]

    @property
    def _start(self) -> list[int]:
        """What an empty context is made of."""
        spec = self._spec
        return [spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id]

    def _text(self, tokens: Sequence[int], until: str | Sequence[str] | None) -> str:
        own = [] if until is None or self._escape_until else [until] if isinstance(until, str) else list(until)
        stops = [stop for stop in (*own, *self._until) if stop]
        controls = {
            self._controls[stop] for stop in stops if stop in self._controls
        }  # decoding leaves no trace of them
        end = next((place for place, token in enumerate(tokens) if token in controls), len(tokens))
        text = chat.decode(self._tokenizer, tokens[:end], self._spec.eot_text)
        for stop in stops:
            text = text.partition(stop)[0]
        return text


def _questions(requests: Sequence[Instance]) -> list[list[int]]:
    """Places of the choices of each question. Choices without their context (mutual information) are apart."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, request in enumerate(requests):
        known = request.doc_id is not None
        groups[(request.task_name, request.doc_id, not request.args[0]) if known else row].append(row)
    return list(groups.values())


registration.register()
