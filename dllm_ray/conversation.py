"""A conversation in the terminal: its turns, how they are answered, and the commands that a line may be.

Imports what is heavy when it is needed, so that a job answers `--help` at once.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dllm_ray import chat, infilling
from dllm_ray.config import read, to_dict
from dllm_ray.errors import ConfigError, DataError, OutputError
from dllm_ray.output import printable
from dllm_ray.sampling.config import SamplerConfig

if TYPE_CHECKING:
    from dllm_ray.models.lm import DiffusionLM
    from dllm_ray.sampling.output import SampleOutput
    from dllm_ray.sampling.sampler import Sampler
    from dllm_ray.viz.html import ReplayRow

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


class Conversation:
    """A conversation with a model, and what its user has set.

    Args:
        lm: the model.
        path: what it is called.
        config: how to denoise, to begin with.
        system: the system message, to begin with.
        show: how to draw answers on a terminal, to begin with.
    """

    def __init__(
        self,
        lm: "DiffusionLM",
        path: str,
        config: SamplerConfig,
        system: str | None = None,
        show: Literal["step", "confidence", "off"] = "step",
    ):
        self.lm = lm
        self.path = path
        self.system = system
        self.config = config
        self.show = show
        self.turns: list[dict[str, str]] = []
        self.last: tuple[ReplayRow, dict] | None = None  # the last answer, and the settings it was made with
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

    def check(self, config: SamplerConfig) -> None:
        """Makes sure that the model can be sampled with these settings.

        Raises:
            ConfigError: it can't.
        """
        from dllm_ray.sampling.sampler import Sampler

        config.blocks()
        Sampler(self.lm, config).canvases([[self.lm.spec.eos_token_id]])

    # --- answers

    def _answer(self, text: str) -> None:
        tokenizer, spec = self.lm.tokenizer, self.lm.spec
        if infilling.has_gaps(text):
            output = self._denoise(infilling.encode_gaps(tokenizer, spec.mask_token_id, text), infill=True)
            answer = chat.decode(tokenizer, output.sequences[0])
        else:
            question = {"role": "user", "content": text}
            output = self._denoise(chat.encode_prompt(tokenizer, [*self.messages, question]), infill=False)
            answer = chat.decode(tokenizer, output.completions[0], spec.eot_text)
            self.turns += [question, {"role": "assistant", "content": answer}]
        if not self._is_drawn:
            print(printable(answer), flush=True)

    def _denoise(self, prompt: list[int], infill: bool) -> "SampleOutput":
        """The sampler's output; it is drawn and kept for a replay."""
        from dllm_ray.sampling.sampler import Sampler
        from dllm_ray.viz.html import ReplayRow
        from dllm_ray.viz.live import denoise

        sampler = Sampler(self.lm, self.config)
        canvas = self._canvas(sampler, prompt, infill)
        output = denoise(sampler, prompt, canvas, infill, colour=self.show if self._is_drawn else None)
        row = ReplayRow(canvas, output.commits[0], 0 if infill else len(prompt), output.sequences[0])
        self.last = row, {"model": self.path} | to_dict(self.config)
        return output

    def _canvas(self, sampler: "Sampler", prompt: list[int], infill: bool) -> list[int]:
        config, limit = self.config, self.lm.max_length
        if infill:
            if limit is not None and len(prompt) > limit:
                raise DataError(f"the text has {len(prompt)} tokens, more than the model's context of {limit}")
        elif config.max_new_tokens is None and len(prompt) >= config.max_length:
            raise DataError(self._no_room(len(prompt), "an answer", f"max_length ({config.max_length})"))
        [canvas] = sampler.canvases([prompt], infill)
        if limit is not None and len(canvas) > limit:
            new = f"{len(canvas) - len(prompt)} of an answer"
            raise DataError(self._no_room(len(prompt), new, f"the model's context of {limit}"))
        return canvas

    def _no_room(self, length: int, answer: str, room: str) -> str:
        name = "max_length" if self.config.max_new_tokens is None else "max_new_tokens"
        begin = "/reset forgets the conversation, /undo its last question" if self.turns else "shorten the question"
        return (
            f"the conversation has {length} tokens: with {answer} it doesn't fit {room}. It stays as it was before "
            f"this question: {begin}, /set {name} changes the room for an answer"
        )

    @property
    def _is_drawn(self) -> bool:
        return self.show != "off" and is_interactive()

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
        check_template(self.lm.tokenizer, text)
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
        self.check(config)
        self.config = config
        print(f"{name} {json.dumps(to_dict(config)[name])}")

    def _set_show(self, value: str) -> None:
        if value not in ("step", "confidence", "off"):
            raise ConfigError(f"expected step, confidence or off, got {value!r}", "/show")
        self.show = value
        print(f"show {value}")

    def _write_html(self, name: str) -> None:
        from dllm_ray.viz.html import replay

        path = _file(name, "/html")
        if self.last is None:
            raise ConfigError("there is no answer to replay yet", "/html")
        row, settings = self.last
        replay(path, self.lm.tokenizer, self.lm.spec, [row], "Denoising", settings)
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
