"""Answers: what they depend on, how they are kept while a long run is under way, and how they are told as rows.

`AnswerStore` lets a run that was killed go on where it was. It is one file that only grows: what the run is (its key),
then a line for each answer, in the order in which they are finished. A line that a kill cut short is dropped when the
file is opened again. Who answers, in this process or on Ray, is not its business: an answer belongs to a row number.
"""

import fcntl
import hashlib
import json
import os
import secrets
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_ray import chat
from dllm_ray.config import to_dict
from dllm_ray.errors import DataError, OutputError
from dllm_ray.models.adapters import base_of, is_adapter
from dllm_ray.models.checkpoint import find
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.output import SampleOutput

if TYPE_CHECKING:
    from dllm_ray.sampling.sampler import Sampler

ANSWER_COLUMNS = ("completion", "completion_tokens", "nfe", "tpf", "seed", "sequence")
"""What `answer_columns` tells."""

_BEGINNING = b'{"key":{'  # of the file of a store
_TRIES = 100  # to open a file that others remove


@dataclass(frozen=True)
class Answer:
    """What was written for one prompt."""

    tokens: list[int]
    """Token ids, without the one that ended the text."""
    nfe: int
    """Forwards that the prompt took part in."""
    ended: bool
    """Whether an end-of-text token ended it; else it ran to its limit."""
    whole: list[int] | None = None
    """The whole text, where `needs_whole` says so."""


@dataclass(frozen=True)
class Progress:
    """How far requests are that were handed in together."""

    requests: int
    """All of them; equal ones count once."""
    kind: str = "generate"
    """`generate` for texts that are written, `score` for likelihoods."""
    done: int = 0
    """Answered, those from disk included."""
    from_disk: int = 0
    """Those that an earlier run had answered."""
    slices: int = 0
    """Pieces of work that are made of the others."""
    slices_done: int = 0
    tokens: int = 0
    """Written, in the answers from disk too."""
    nfe: int = 0
    """Forwards that written answers took part in, summed over answers."""
    noisy: int = 0
    """Noisy sequences that likelihoods sent through the model."""
    seconds: float = 0.0
    """Workers' time, divided by the workers; answers from disk bring what they took then."""


class AnswerStore:
    """The answers of one run, by row. In memory only their places in the file are held.

    Args:
        path: the file; made when missing, else gone on with.
        key: all that the answers depend on, as plain values.
        fresh: throw away what an earlier run left.
        otherwise: what a user can do who doesn't want what the file holds.

    Raises:
        OutputError: the file holds answers under another key or something else, is in use by another run, or can't be
            written.
    """

    def __init__(
        self,
        path: Path,
        key: Mapping[str, Any],
        fresh: bool = False,
        otherwise: str = "delete it, or name another file",
    ):
        self.path = path
        self.facts: dict[str, Any] = {}
        """What `add` and `remember` recorded beside the answers."""
        self._places: dict[int, int] = {}  # row -> first byte of its line
        self._file = _open(path)
        self._reader = None
        try:
            before = None if fresh else self._read(otherwise)
            key = json.loads(json.dumps(key))
            changed = changes(before or {}, key)
            if changed and self._places:
                raise OutputError(
                    f"{path} holds {len(self._places)} answers of an unfinished run with other settings: "
                    f"{'; '.join(changed)}. Go on with those settings, {otherwise}"
                )
            if changed or before is None:  # nothing to lose
                self.facts = {}
                self._file.truncate(0)
                self._write([{"key": key}])
            # opened when the file only grows from here on: what it reads ahead stays true
            self._reader = path.open("rb")
        except OSError as error:
            self.close()
            raise OutputError(f"{path} can't be used: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, row: object) -> bool:
        return row in self._places

    def __getitem__(self, row: int) -> Answer:
        self._reader.seek(self._places[row])
        entry = json.loads(self._reader.readline())
        return Answer(entry["tokens"], entry["nfe"], entry["ended"], entry.get("whole"))

    def add(self, answers: Mapping[int, Answer], **facts: Any) -> None:
        """Keeps answers, and facts about the run that hold with them.

        Raises:
            OutputError: the file can't be written; it holds what it held before.
        """
        entries = [{"row": row, **vars(answer)} for row, answer in answers.items()]
        places = self._write([*entries, {"facts": facts}] if facts else entries)
        self._places |= dict(zip(answers, places, strict=False))
        self.facts |= facts

    def remember(self, **facts: Any) -> None:
        """Keeps facts about the run."""
        self.add({}, **facts)

    def remove(self) -> None:
        """Deletes the file: its answers have found their place."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets other runs use the file."""
        if self._reader is not None:
            self._reader.close()
        self._file.close()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _read(self, otherwise: str) -> dict[str, Any] | None:
        """The key; answers and facts are taken in. What a kill left unfinished at the end is cut off."""
        with self.path.open("rb") as file:
            key, end = self._take(file)
            if key is None:
                file.seek(0)
                first = file.readline()
                # a kill leaves the beginning of our first line, or nothing
                if first.endswith(b"\n") or first[: len(_BEGINNING)] != _BEGINNING[: len(first)]:
                    raise OutputError(f"{self.path} is damaged, or no file of answers: {otherwise}")
        self._file.truncate(end)
        return key

    def _take(self, lines: Iterable[bytes]) -> tuple[dict[str, Any] | None, int]:
        """Takes in whole lines; returns the key, and where the last of them ends."""
        key, end = None, 0
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            if key is None:
                if not isinstance(entry.get("key"), dict):
                    break
                key = entry["key"]
            elif "facts" in entry:
                self.facts |= entry["facts"]
            elif "row" in entry:
                self._places[entry["row"]] = end
            else:
                break
            end += len(line)
        return key, end

    def _write(self, entries: list[dict]) -> list[int]:
        """Appends a line for each entry; returns where the lines begin."""
        lines = [json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries]
        places = []
        start = end = self._file.seek(0, os.SEEK_END)
        for line in lines:
            places.append(end)
            end += len(line)
        left = memoryview(b"".join(lines))
        try:
            while left:
                left = left[self._file.write(left) :]  # what is written outlives this process
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)  # lines that follow later must not follow half a line
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}") from error
        return places


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two keys, in words."""
    return [
        f"{name} was {before.get(name)!r}, is now {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    ]


def answer_key(
    model: ModelConfig,
    config: SamplerConfig,
    slice_rows: int,
    prompts: Sequence[Sequence[int]],
    infill: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """All that answers depend on, for an `AnswerStore`: model and its files, settings, slices, prompts, drafts."""
    return {
        **model_key(model),
        **{f"sampler.{name}": value for name, value in to_dict(config).items()},
        "batch_size": slice_rows,
        "infill": infill,
        "prompts": _told(prompts),
        "drafts": None if drafts is None else _told(drafts),
    }


def _told(rows: Sequence[Sequence[int]]) -> str:
    """Token ids in short."""
    digest = hashlib.sha256()
    for row in rows:
        ids = array("q", row).tobytes()
        digest.update(len(ids).to_bytes(8, "little") + ids)
    return f"{len(rows)} of digest {digest.hexdigest()[:16]}"


def model_key(model: ModelConfig) -> dict[str, Any]:
    """What answers depend on of the model: where it and its adapter are, their files, and how they are loaded."""
    key = {f"model.{name}": getattr(model, name) for name in ("path", "adapter", "dtype", "quantization")}
    for name in ("path", "adapter"):
        folder = getattr(model, name)
        if folder is not None:
            key[f"files of model.{name}"] = _files_digest(folder)
    return key


def base_seed(store: AnswerStore, config: SamplerConfig) -> int:
    """The seed that a run's rows derive theirs from; where the settings leave it open it is drawn once and kept."""
    if "seed" not in store.facts:
        store.remember(seed=secrets.randbits(62) if config.seed is None else config.seed)
    return store.facts["seed"]


def write(
    sampler: "Sampler",
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    infill: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
    trace: bool = False,
) -> SampleOutput:
    """What a sampler makes of prompts: answers, drafts of answers revised, or with `infill` their gaps filled in."""
    if drafts is not None:
        return sampler.edit(prompts, drafts, trace=trace, seeds=seeds)
    return (sampler.infill if infill else sampler.sample)(prompts, trace=trace, seeds=seeds)


def canvases(
    sampler: "Sampler",
    prompts: Sequence[Sequence[int]],
    infill: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """What `write` begins with."""
    if drafts is not None:
        return [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    return sampler.canvases(prompts, infill)


def needs_whole(spec: DiffusionSpec, config: SamplerConfig, infill: bool) -> bool:
    """Whether an answer alone doesn't tell the text: gaps have lengths of their own, or prompts are edited too."""
    return spec.edit_heads is not None and (infill or config.edit_prompt)


def ended_by_stop(prompts: Sequence[Sequence[int]], output: SampleOutput, stop_token_ids: Iterable[int]) -> list[bool]:
    """Whether an end-of-text token ended each answer of a call; else it ran to its limit, or to where its model had
    nothing more to write."""
    stops = set(stop_token_ids)

    def ended(prompt: Sequence[int], completion: list[int], sequence: list[int]) -> bool:
        if sequence[: len(prompt)] != list(prompt):  # it was edited too, and may have another length now
            return sequence[len(sequence) - len(completion) :] != completion and not stops.isdisjoint(sequence)
        added = not prompt and sequence[: len(completion)] != completion  # a beginning, where there was none
        end = len(prompt) + added + len(completion)
        return end < len(sequence) and sequence[end] in stops

    return [*map(ended, prompts, output.completions, output.sequences)]


def require_free_columns(where: Callable[[], str], row: Mapping[str, Any]) -> None:
    """Makes sure that a row has room for the columns of its answer.

    Args:
        where: says where the row is from.
        row: its own columns.

    Raises:
        DataError: it has one that is called the same.
    """
    for name in ANSWER_COLUMNS:
        if name in row:
            raise DataError(
                f"{where()}: its column {name!r} is called like one of the answer's: rename it or leave it out"
            )


def answer_columns(
    tokenizer, spec: DiffusionSpec, answer: Answer, seed: int, gaps: Sequence[int] | None = None
) -> dict[str, Any]:
    """An answer as columns of a row: its text, its figures, and the seed that gives it again.

    Args:
        tokenizer: of the model.
        spec: of the model.
        answer: what was written.
        seed: the row's.
        gaps: the token ids whose masks the answer fills; the text is then the whole one. None: it follows its prompt;
            where that was edited too, a column `sequence` tells both.
    """
    more = {}
    if gaps is None:
        text = chat.decode(tokenizer, answer.tokens, spec.eot_text)
        more = {} if answer.whole is None else {"sequence": chat.decode(tokenizer, answer.whole)}
    elif answer.whole is not None:
        text = chat.decode(tokenizer, answer.whole)
    else:
        written = iter(answer.tokens)
        text = chat.decode(tokenizer, [next(written) if token == spec.mask_token_id else token for token in gaps])
    return {
        "completion": text,
        "completion_tokens": len(answer.tokens),
        "nfe": answer.nfe,
        "tpf": len(answer.tokens) / max(answer.nfe, 1),
        "seed": seed,
        **more,
    }


def _open(path: Path):
    """The file, locked. Nothing is buffered: what can't be written is told where it is written, and only there."""
    for _ in range(_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise OutputError(f"{path} can't be written: {error.strerror or error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(f"another run is using {path}: wait for it, or name another place") from None
        except OSError:
            pass  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the run that had the lock removed it in between
    raise OutputError(f"{path} goes away whenever it is opened: name another place")


def _files_digest(model: str) -> str:
    """Names, sizes and times of the files of a local model; of a hub id its revision."""
    folders = [model, base_of(model)] if is_adapter(model) else [model]
    digest = hashlib.sha256(repr(folders).encode())
    for folder in folders:
        if not Path(folder).is_dir():
            config = find(folder, "config.json")  # in the hub's cache, in a folder called like the revision
            digest.update(b"" if config is None else config.parent.name.encode())
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file() and file.suffix != ".md":
                facts = file.stat()
                digest.update(repr((str(file), facts.st_size, facts.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]
