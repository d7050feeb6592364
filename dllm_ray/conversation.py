"""A conversation in the terminal: its turns, how they are answered, and the commands that a line may be.

Imports what is heavy when it is needed, so that a job answers `--help` at once.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from dllm_ray import chat, infilling
from dllm_ray.config import read, to_dict
from dllm_ray.errors import ConfigError, DataError, OutputError
from dllm_ray.output import printable
from dllm_ray.sampling.config import SamplerConfig

if TYPE_CHECKING:
    from dllm_ray.models.lm import DiffusionLM
    from dllm_ray.sampling.output import SampleOutput
    from dllm_ray.viz.html import ReplayRow

Colour = Literal["step", "confidence"]
"""What the colours of a drawing tell."""

HELP = """\
/reset              forget the conversation
/undo               forget the last question and its answer
/system TEXT        the system message; without a text there is none
/set NAME VALUE     change a sampler setting; /set alone lists those that are not the defaults
/show step          draw the denoising, coloured by step; also: /show confidence, /show off
/html FILE          write a replay of the last answer, as a web page
/save FILE          append the conversation to a jsonl file
/help               this list
/quit               end (also Ctrl-D); Ctrl-C drops an answer that is being written
[MASK] or [MASK:8] in a message makes it a text to fill in. Put a space before a / that begins a message."""


class Partner(Protocol):
    """What a conversation is held with: a model in this process, or one behind an address."""

    name: str
    """What it is called."""

    def check(self, config: SamplerConfig) -> None:
        """Makes sure that it can be sampled with these settings.

        Raises:
            ConfigError: it can't.
        """
        ...

    def check_system(self, system: str | None) -> None:
        """Makes sure that it takes a conversation, with this system message if there is one.

        Raises:
            DataError: it doesn't.
        """
        ...

    def answer(self, messages: Sequence[Mapping[str, str]], config: SamplerConfig, colour: Colour | None) -> str:
        """The next turn of a conversation; it is drawn while it is denoised, unless `colour` is None.

        Raises:
            DllmRayError: there is none.
        """
        ...

    def fill(self, text: str, config: SamplerConfig, colour: Colour | None) -> str:
        """A text with its gaps filled; the rest as in `answer`."""
        ...

    def replay(self, path: Path) -> None:
        """Writes a page that replays the last answer.

        Raises:
            DllmRayError: it can't.
        """
        ...


class Conversation:
    """A conversation with a model, and what its user has set.

    Args:
        partner: the model.
        config: how to denoise, to begin with.
        system: the system message, to begin with.
        show: how to draw answers on a terminal, to begin with.
    """

    def __init__(
        self,
        partner: Partner,
        config: SamplerConfig,
        system: str | None = None,
        show: Literal["step", "confidence", "off"] = "step",
    ):
        self.partner = partner
        self.system = system
        self.config = config
        self.show = show
        self.turns: list[dict[str, str]] = []
        self._commands = {
            "reset": self._reset,
            "undo": self._undo,
            "system": self._set_system,
            "set": self._set,
            "show": self._set_show,
            "html": self._write_html,
            "save": self._save,
            "help": lambda _: print(HELP),
        }

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, the system message in front."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def take(self, text: str) -> bool:
        """Does what a line asks for; False: end.

        Raises:
            DllmRayError: it can't be done, and nothing has changed.
        """
        if not text.strip():
            return True
        if not is_unicode(text):
            raise DataError("the message is not valid Unicode")
        if not text.startswith("/"):
            self._answer(text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name.strip() in ("quit", "exit"):
            return False
        command = self._commands.get(name.strip())
        if command is None:
            raise ConfigError(f"no command is called /{name.strip()}; /help lists them")
        command(rest.strip())
        return True

    def _answer(self, text: str) -> None:
        colour = self.show if self.show != "off" and is_interactive() else None
        if infilling.has_gaps(text):
            answer = self.partner.fill(text, self.config, colour)
        else:
            question = {"role": "user", "content": text}
            answer = self.partner.answer([*self.messages, question], self.config, colour)
            self.turns += [question, {"role": "assistant", "content": answer}]
        if colour is None:
            print(printable(answer), flush=True)

    # --- commands

    def _reset(self, _: str) -> None:
        self.turns = []
        print("the conversation is forgotten")

    def _undo(self, _: str) -> None:
        if not self.turns:
            raise ConfigError("there is no question to take back")
        self.turns = self.turns[:-2]
        print(f"{len(self.turns) // 2} questions are left")

    def _set_system(self, text: str) -> None:
        self.partner.check_system(text)
        self.system = text or None
        print("the system message is set" if text else "there is no system message")

    def _set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        if not name:
            defaults = to_dict(SamplerConfig())
            changed = {key: value for key, value in to_dict(self.config).items() if value != defaults[key]}
            for key, value in changed.items():
                print(f"{key} {json.dumps(value)}  (default {json.dumps(defaults[key])})")
            if not changed:
                print("every setting has its default")
            return
        if not value.strip():
            raise ConfigError("give a value, e.g. /set steps 64", name)
        config = read(SamplerConfig, to_dict(self.config) | {name: value.strip()}, "/set")
        self.partner.check(config)
        self.config = config
        print(f"{name} {json.dumps(to_dict(config)[name])}")

    def _set_show(self, value: str) -> None:
        if value not in ("step", "confidence", "off"):
            raise ConfigError(f"expected step, confidence or off, got {value!r}", "/show")
        self.show = value
        print(f"show {value}")

    def _write_html(self, name: str) -> None:
        path = _file(name, "/html")
        self.partner.replay(path)
        print(f"replay in {path}")

    def _save(self, name: str) -> None:
        path = _file(name, "/save")
        if not self.turns:
            raise ConfigError("there is no conversation to save yet", "/save")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            before = path.read_bytes() if path.exists() else b""
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * (before != b"" and not before.endswith(b"\n")) + row + "\n")
        except OSError as error:
            raise OutputError(f"{path} can't be written: {error.strerror or error}") from None
        print(f"conversation appended to {path}")


class LocalPartner:
    """A model in this process.

    Args:
        lm: the model.
        name: what it is called.
    """

    def __init__(self, lm: "DiffusionLM", name: str):
        self.lm = lm
        self.name = name
        self._last: tuple[ReplayRow, dict] | None = None  # the last answer, and the settings it was made with

    def check(self, config: SamplerConfig) -> None:
        """As `Partner.check`."""
        from dllm_ray.sampling.plan import check
        from dllm_ray.sampling.sampler import Sampler

        check(config, self.lm.spec)
        Sampler(self.lm, config).canvases([[self.lm.spec.eos_token_id]])

    def check_system(self, system: str | None) -> None:
        """As `Partner.check_system`."""
        check_template(self.lm.tokenizer, system)

    def answer(self, messages: Sequence[Mapping[str, str]], config: SamplerConfig, colour: Colour | None) -> str:
        """As `Partner.answer`."""
        prompt = chat.encode_prompt(self.lm.tokenizer, list(messages))
        has_turns = any(message["role"] == "assistant" for message in messages)
        output = self._denoise(self._continued(prompt, config, has_turns), prompt, config, colour)
        return chat.decode(self.lm.tokenizer, output.completions[0], self.lm.spec.eot_text)

    def fill(self, text: str, config: SamplerConfig, colour: Colour | None) -> str:
        """As `Partner.fill`."""
        from dllm_ray.sampling.sampler import Sampler

        row = infilling.encode_gaps(self.lm.tokenizer, self.lm.spec.mask_token_id, text)
        limit = self.lm.max_length
        if limit is not None and len(row) > limit:
            raise DataError(f"the text has {len(row)} tokens, more than the model's context of {limit}")
        [canvas] = Sampler(self.lm, config).canvases([row], infill=True)
        output = self._denoise(canvas, row, config, colour, infill=True)
        return chat.decode(self.lm.tokenizer, output.sequences[0])

    def replay(self, path: Path) -> None:
        """As `Partner.replay`."""
        from dllm_ray.viz.html import replay

        if self._last is None:
            raise ConfigError("there is no answer to replay yet", "/html")
        row, settings = self._last
        replay(path, self.lm.tokenizer, self.lm.spec, [row], "Denoising", settings)

    def _denoise(
        self,
        canvas: list[int],
        prompt: list[int],
        config: SamplerConfig,
        colour: Colour | None,
        infill: bool = False,
    ) -> "SampleOutput":
        """The sampler's output; it is drawn and kept for a replay."""
        from dllm_ray.sampling.sampler import Sampler
        from dllm_ray.viz.html import ReplayRow
        from dllm_ray.viz.live import denoise

        output = denoise(Sampler(self.lm, config), prompt, canvas, infill, colour=colour)
        row = ReplayRow(canvas, output.commits[0], 0 if infill else len(prompt), output.sequences[0])
        self._last = row, {"model": self.name} | to_dict(config)
        return output

    def _continued(self, prompt: list[int], config: SamplerConfig, has_turns: bool) -> list[int]:
        """The canvas of an answer."""
        from dllm_ray.sampling.sampler import Sampler

        limit = self.lm.max_length
        if config.max_new_tokens is None and len(prompt) >= config.max_length:
            room = f"max_length ({config.max_length})"
            raise DataError(_no_room(len(prompt), "an answer", room, "max_length", has_turns))
        sampler = Sampler(self.lm, config)
        [canvas] = sampler.canvases([prompt])
        longest = sampler.rows([prompt])[0].longest if sampler.edits else len(canvas)
        if limit is not None and longest > limit:
            new = f"{longest - len(prompt)} of an answer"
            name = "max_length" if config.max_new_tokens is None else "max_new_tokens"
            raise DataError(_no_room(len(prompt), new, f"the model's context of {limit}", name, has_turns))
        return canvas


def _no_room(length: int, answer: str, room: str, setting: str, has_turns: bool) -> str:
    begin = "/reset forgets the conversation, /undo its last question" if has_turns else "shorten the question"
    return (
        f"the conversation has {length} tokens: with {answer} it doesn't fit {room}. It stays as it was before "
        f"this question: {begin}, /set {setting} changes the room for an answer"
    )


def check_template(tokenizer, system: str | None) -> None:
    """Makes sure that the model's chat template takes a conversation, with this system message if there is one.

    Raises:
        DataError: it doesn't.
    """
    first = [{"role": "system", "content": system}] if system else []
    chat.render(tokenizer, [*first, {"role": "user", "content": "hi"}], add_generation_prompt=True)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: a terminal or a file may hand over half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_interactive() -> bool:
    """Whether somebody sits in front of it."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _file(name: str, command: str) -> Path:
    if not name:
        raise ConfigError("name a file", command)
    if "\0" in name:
        raise ConfigError("the name of a file can't hold a NUL", command)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file in it")
    except RuntimeError:
        raise ConfigError(f"there is no home folder {name.partition('/')[0]}", command) from None
    except OSError as error:
        raise OutputError(f"{name} can't be written: {error.strerror or error}") from None
    return path
