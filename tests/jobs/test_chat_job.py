"""jobs/chat.py: conversations from a pipe and on a terminal, its commands, and what it says to mistakes."""

import io
import json
import subprocess
import sys
import time

import pytest
from jobs_testing import ROOT, environment, load_job
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from dllm_ray import chat as encoding
from dllm_ray.cli import run_job
from dllm_ray.infilling import encode_gaps
from dllm_ray.models.load import load
from dllm_ray.models.tokenizers import DEFAULT_CHAT_TEMPLATE
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Engine
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz import terminal
from dllm_ray.viz.spelling import printable

SETTINGS = {"sampler.max_new_tokens": "8", "sampler.block_size": "8", "sampler.steps": "4", "sampler.seed": "5"}
CONFIG = SamplerConfig(max_new_tokens=8, block_size=8, steps=4, seed=5)


@pytest.fixture(scope="module")
def job():
    """The job's file as a module."""
    return load_job("chat")


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> str:
    """A directory with a model of 128 positions."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    make_lm("bert", max_position_embeddings=128).save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _no_progress_bars():
    """In a process of its own the job has none; here transformers was imported before it."""
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture
def talk(job, model, monkeypatch, capsys):
    """Runs the job on lines from a pipe; returns its status, and the lines of its output and of its errors."""

    def call(*lines: str, **settings: str) -> tuple[int, list[str], list[str]]:
        words = {"model.path": model} | SETTINGS | {name.replace("__", "."): text for name, text in settings.items()}
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        argv = [word for name, text in words.items() for word in (f"--{name}", text)]
        status = run_job(job.ChatJob, job.main, "", argv)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err.splitlines()

    return call


def answers(model: str, *questions: str, system: str | None = None, config: SamplerConfig = CONFIG) -> list[str]:
    """What the model answers, question after question."""
    lm = load(model)
    messages = [{"role": "system", "content": system}] if system else []
    given = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        output = Sampler(lm, config).sample([encoding.encode_prompt(lm.tokenizer, messages)])
        given.append(encoding.decode(lm.tokenizer, output.completions[0], lm.spec.eot_text))
        messages.append({"role": "assistant", "content": given[-1]})
    return given


def printed(texts: list[str]) -> list[str]:
    return "\n".join(map(printable, texts)).splitlines()


# --- conversations


def test_lines_of_a_pipe_are_answered_as_one_conversation(talk, model, tmp_path):
    status, out, err = talk("sort 21", "", "reverse 12", f"/save {tmp_path / 'chat.jsonl'}")
    first, second = answers(model, "sort 21", "reverse 12")
    assert status == 0 and err == []
    assert out == [*printed([first, second]), f"conversation appended to {tmp_path / 'chat.jsonl'}"]
    row = json.loads((tmp_path / "chat.jsonl").read_text())
    assert row == {
        "messages": [
            {"role": "user", "content": "sort 21"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "reverse 12"},
            {"role": "assistant", "content": second},
        ]
    }


def test_a_conversation_goes_on_where_the_template_drops_earlier_thoughts(talk, make_lm, tmp_path):
    lm = make_lm("bert", max_position_embeddings=128)
    lm.tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'user' or loop.last %}"
        "{{ message.content }}{% else %}{{ message.content[-1:] }}{% endif %}<|endoftext|>{% endfor %}"
    )
    try:
        lm.save(tmp_path / "m")
    finally:
        lm.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # the tokenizer is shared by all tests
    path = tmp_path / "chat.jsonl"
    status, _, err = talk("sort 21", "sort 32", "sort 43", f"/save {path}", model__path=str(tmp_path / "m"))
    assert status == 0 and err == []
    said = [turn["content"] for turn in json.loads(path.read_text())["messages"]]
    assert said[1::2] == answers(str(tmp_path / "m"), *said[::2])


def test_reset_and_undo_forget(talk, tmp_path):
    files = [tmp_path / name for name in ("undone", "reset")]
    status, out, err = talk(
        "sort 21", "sort 32", "/undo", f"/save {files[0]}", "/reset", "/undo", "sort 9", f"/save {files[1]}"
    )
    assert status == 0 and "1 questions are left" in out
    assert err == ["error: there is no question to take back"]
    asked = [[turn["content"] for turn in json.loads(f.read_text())["messages"][::2]] for f in files]
    assert asked == [["sort 21"], ["sort 9"]]


def test_a_system_message_leads_the_conversation(talk, model, tmp_path):
    path = tmp_path / "chat.jsonl"
    _, _, err = talk("/system Sort it.", "21", f"/save {path}", "/system", "/reset", "21", f"/save {path}")
    assert err == []
    first, second = (json.loads(line)["messages"] for line in path.read_text().splitlines())
    assert first[0] == {"role": "system", "content": "Sort it."} and second[0]["role"] == "user"
    assert first[2]["content"] == answers(model, "21", system="Sort it.")[0]
    _, _, err = talk("21", f"/save {path}", system="Sort it.")
    assert json.loads(path.read_text().splitlines()[-1])["messages"] == first


def test_saving_never_harms_a_file(talk, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}')  # no line break at its end
    _, _, err = talk("/save " + str(path), "hi", "/save", "/save " + str(tmp_path / "gone" / "a"), "/save " + str(path))
    assert [json.loads(line) is not None for line in path.read_text().splitlines()] == [True, True]
    assert err == [
        "error: /save: there is no conversation to save yet",
        "error: /save: name a file",
        f"error: {tmp_path / 'gone' / 'a'} can't be written: No such file or directory",
    ]


@pytest.mark.parametrize("command", ["/save", "/html"])
def test_a_name_that_is_no_file_is_one_line_and_the_conversation_goes_on(talk, tmp_path, command):
    names = [".", str(tmp_path), "~nosuchuser/x", "a\0b", "x" * 300]
    path = tmp_path / "chat.jsonl"
    status, out, err = talk("sort 21", *(f"{command} {name}" for name in names), f"/save {path}")
    assert status == 0 and out[-1] == f"conversation appended to {path}"
    assert err == [
        "error: . is a folder: name a file in it",
        f"error: {tmp_path} is a folder: name a file in it",
        f"error: {command}: there is no home folder ~nosuchuser",
        f"error: {command}: the name of a file can't hold a NUL",
        f"error: {'x' * 300} can't be written: File name too long",
    ]


def test_what_an_error_quotes_does_not_command_the_terminal(talk):
    assert talk("/\x1b[2J")[2] == ["error: no command is called /␛[2J; /help lists them"]


def test_a_text_with_gaps_is_filled_outside_the_conversation(talk, model, tmp_path):
    _, out, err = talk("sort [MASK:3] fox[MASK]", "/undo", "[MASK:0]", "[MASK:200]")
    lm = load(model)
    row = encode_gaps(lm.tokenizer, lm.spec.mask_token_id, "sort [MASK:3] fox[MASK]")
    [filled] = Sampler(lm, CONFIG).infill([row]).sequences
    assert out == printed([lm.tokenizer.decode(filled, skip_special_tokens=True)])
    assert err == [
        "error: there is no question to take back",
        "error: [MASK:0]: a gap has between 1 and 1,000,000 tokens",
        "error: the text has 200 tokens, more than the model's context of 128",
    ]


def test_a_conversation_that_outgrows_the_context_is_kept(talk, tmp_path):
    path = tmp_path / "chat.jsonl"
    long = "9" * 60
    status, _, err = talk(long, long, f"/save {path}", "9", "/reset", long, "9" * 130)
    assert status == 0
    assert "the model's context of 128" in err[0] and "/reset forgets the conversation" in err[0]
    assert len(json.loads(path.read_text())["messages"]) == 2
    assert len(err) == 2 and "shorten the question" not in err[0]
    _, _, err = talk("9" * 130)
    assert len(err) == 1 and "shorten the question" in err[0] and "/set max_new_tokens" in err[0]
    _, _, err = talk("9" * 60, "/reset", sampler__max_new_tokens="null", sampler__max_length="50", sampler__steps="50")
    assert len(err) == 1 and "max_length (50)" in err[0]


def test_an_answer_that_is_revised_and_cut_is_the_one_of_the_sampler(talk, golden, tmp_path):
    """LLaDA2.1 rewrites its own tokens, and denoises whole blocks, of which the answer is a part."""
    path, page, saved = str(golden / "llada21" / "checkpoint"), tmp_path / "page.html", tmp_path / "chat.jsonl"
    config = SamplerConfig(policy="llada21", max_new_tokens=10, threshold=0.01, editing_threshold=0.001)
    settings = {"policy": "llada21", "max_new_tokens": "10", "threshold": "0.01", "editing_threshold": "0.001"}
    words = {f"sampler__{name}": text for name, text in settings.items()}
    words |= {"sampler__block_size": "32", "sampler__steps": "128"}
    _, _, err = talk("hi", f"/html {page}", f"/save {saved}", model__path=path, **words)
    assert err == []
    [_, answer] = json.loads(saved.read_text())["messages"]
    assert answer["content"] == answers(path, "hi", config=config)[0]
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    writes = [change["positions"] for step in data["rows"][0]["steps"] for change in step.get("changes", [])]
    positions = [position for written in writes for position in written]
    assert len(positions) > len(set(positions))


# --- settings


def test_settings_are_changed_typed_and_checked(talk, model):
    status, out, err = talk(
        "/set temperature 1e0",
        "/set steps eight",
        "/set stepz 8",
        "/set steps 0",
        "/set block_size 1",
        "/set steps",
        "/set max_length null",
        "sort 21",
        "/set",
    )
    assert status == 0
    assert err == [
        "error: /set: steps: expected int, got eight",
        "error: /set: unknown key 'stepz'; did you mean steps?",
        "error: /set: steps: must be at least 1, got 0",
        "error: steps: 4 steps are fewer than the 8 blocks of the answer: raise steps or block_size",
        "error: steps: give a value, e.g. /set steps 64",
    ]
    warm = SamplerConfig(max_new_tokens=8, block_size=8, steps=4, seed=5, temperature=1.0)
    assert out == [
        "temperature 1.0",
        "max_length null",
        *printed(answers(model, "sort 21", config=warm)),
        "max_new_tokens 8  (default 128)",
        "steps 4  (default 128)",
        "block_size 8  (default 32)",
        "temperature 1.0  (default 0.0)",
        "seed 5  (default null)",
    ]


def test_the_settings_of_the_model_are_the_ones_that_it_begins_with(talk, make_lm, tmp_path):
    lm = make_lm("bert")
    lm.model.config.diffusion = lm.spec.to_dict() | {"sampler": {"steps": 3, "max_new_tokens": 3}}
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    _, out, _ = talk("/set", model__path=str(tmp_path / "m"), sampler__steps="7")
    assert "max_new_tokens 8  (default 128)" in out and "steps 7  (default 128)" in out


# --- other commands


def test_the_last_answer_is_written_as_a_page(talk, model, tmp_path):
    path = tmp_path / "page.html"
    status, out, err = talk(f"/html {path}", "sort 21", f"/html {path}", "/html")
    assert status == 0 and f"replay in {path}" in out
    assert err == ["error: /html: there is no answer to replay yet", "error: /html: name a file"]
    data = json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])
    [row] = data["rows"]
    lm = load(model)
    prompt = encoding.encode_prompt(lm.tokenizer, "sort 21")
    [sequence] = Sampler(lm, CONFIG).sample([prompt]).sequences
    assert row["final"] == sequence and row["given"] == [[0, len(prompt)]]
    assert data["settings"]["steps"] == 4 and data["settings"]["model"] == model


def test_help_quit_and_what_is_no_command(talk):
    status, out, err = talk("/help", "/hlep", "/show rainbow", "/show off", "/quit", "never read")
    assert status == 0
    assert out[0].startswith("/reset") and out[-1] == "show off"
    assert err == [
        "error: no command is called /hlep; /help lists them",
        "error: /show: expected step, confidence or off, got 'rainbow'",
    ]


def test_a_line_that_is_no_text_is_refused_alone(talk):
    status, out, err = talk("a\udcff", "/system \udcff", "sort 21")
    assert status == 0 and out and err == ["error: the message is not valid Unicode"] * 2


# --- on a terminal


class Keyboard(io.StringIO):
    """Standard input of a terminal: each item is typed, or raised."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_terminal(job, model, monkeypatch, capsys):
    """Runs the job on what is typed; returns what was drawn, and the output."""

    def call(*typed: str | type[BaseException]) -> tuple[str, str, str]:
        page = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
        monkeypatch.setattr(terminal, "console", page)
        monkeypatch.setattr(sys, "stdin", Keyboard())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        items = iter(typed)

        def type_in(_prompt: str) -> str:
            item = next(items, EOFError)
            if isinstance(item, str):
                return item
            raise item

        monkeypatch.setattr("builtins.input", type_in)
        argv = [word for name, text in ({"model.path": model} | SETTINGS).items() for word in (f"--{name}", text)]
        assert run_job(job.ChatJob, job.main, "", argv) == 0
        out, err = capsys.readouterr()
        return page.file.getvalue(), out, err

    return call


def test_an_answer_is_drawn_while_it_is_denoised(at_terminal, model):
    drawn, out, err = at_terminal("sort 21", "/show off", "sort 21")
    assert "step 4  0 masks left" in drawn and "tokens per forward" in drawn and err == ""
    answer = answers(model, "sort 21")[0]
    assert out.splitlines()[0].endswith("/help lists the commands, Ctrl-D ends.")
    assert answer.splitlines()[0] not in out.partition("show off")[0]
    assert drawn.count("0 masks left") >= 1


def test_ctrl_c_drops_the_answer_and_keeps_the_conversation(at_terminal, monkeypatch, tmp_path):
    path = tmp_path / "chat.jsonl"
    steps = iter([False] * 4 + [False, True])  # a whole answer, then one that is interrupted at its second step
    step = Engine.step

    def interrupted(engine):
        if next(steps, False):
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    _, out, err = at_terminal("sort 21", "sort 32", KeyboardInterrupt, f"/save {path}", "sort 43", f"/save {path}")
    assert "interrupted: the answer is dropped" in err and "/quit or Ctrl-D ends" in out
    before, after = (json.loads(line)["messages"] for line in path.read_text().splitlines())
    assert [turn["content"] for turn in before[::2]] == ["sort 21"]
    assert [turn["content"] for turn in after[::2]] == ["sort 21", "sort 43"]


# --- mistakes, and the command line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.path": "/no/such/folder"}, "no such model directory: /no/such/folder"),
        ({}, "model.path: name the model"),
        ({"sampler.steps": "x"}, "sampler.steps: expected int, got x"),
        ({"model.path": "gone/", "show": "colour"}, "show: expected one of 'step', 'confidence', 'off', got colour"),
        ({"model.path": "gone/", "system": "\udcff"}, "system: it is not valid Unicode"),
    ],
)
def test_bad_input_is_one_message_before_the_model_is_loaded(job, capsys, monkeypatch, settings, message):
    monkeypatch.setattr("dllm_ray.models.load.load", lambda *_: pytest.fail("the model was loaded"))
    argv = [word for name, text in settings.items() for word in (f"--{name}", text)]
    assert run_job(job.ChatJob, job.main, "", argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_comes_at_once():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "jobs/chat.py", "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--sampler.steps" in done.stdout and "/help lists" in done.stdout
    assert time.monotonic() - began < 5  # about one second where nothing else runs


@pytest.mark.slow
def test_a_piped_session_of_its_own(model):
    words = [word for name, text in ({"model.path": model} | SETTINGS).items() for word in (f"--{name}", text)]
    done = subprocess.run(
        [sys.executable, "jobs/chat.py", *words],
        input=b"sort 21\n\xff\nsort [MASK:2]\n",
        cwd=ROOT,
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"error: the message is not valid Unicode\n"
    assert done.stdout.decode().splitlines()[0] == answers(model, "sort 21")[0].splitlines()[0]
