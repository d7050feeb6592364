"""jobs/chat.py --url: the same conversation as with the model in this process, and no model here."""

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from serving_testing import FakeBackend, served

from dllm_ray import chat as encoding
from dllm_ray.cli import run_job
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving.app import create_app
from dllm_ray.serving.calls import Canvas, Refused
from dllm_ray.serving.local import LocalModel
from dllm_ray.serving.settings import AppSettings
from dllm_ray.viz import terminal
from dllm_ray.viz.live_texts import LiveTexts
from dllm_ray.viz.spelling import END, printable

JOB = Path(__file__).resolve().parents[2] / "jobs" / "chat.py"
CONFIG = SamplerConfig(max_new_tokens=8, block_size=8, steps=4, threshold=0.99)


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("job_chat_url", JOB)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("bert", seed=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def url(lm):
    model = LocalModel("small", lm, sampler=CONFIG)
    with served(create_app({"small": model}, AppSettings())) as address:
        yield address
    model.close()


def command_line(words: dict[str, str]) -> list[str]:
    return [word for name, text in words.items() for word in (f"--{name}", text)]


@pytest.fixture
def talk(job, url, monkeypatch, capsys):
    """Runs the job on lines from a pipe; returns its status, and the lines of its output and of its errors."""

    def call(*lines: str, **settings: str) -> tuple[int, list[str], list[str]]:
        words = {"url": url} | {name.replace("__", "."): text for name, text in settings.items()}
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = run_job(
            job.ChatJob, job.main, "", [word for item in words.items() for word in (f"--{item[0]}", item[1])]
        )
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err.splitlines()

    return call


def answers(lm, *questions: str, system: str | None = None, config: SamplerConfig = CONFIG) -> list[str]:
    """What the model answers, question after question."""
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


def test_a_conversation_is_the_one_of_the_sampler(talk, lm, tmp_path):
    path = tmp_path / "chat.jsonl"
    status, out, err = talk("/system Sort it.", "sort 21", "reverse 12", f"/save {path}", served_model="small")
    expected = answers(lm, "sort 21", "reverse 12", system="Sort it.")
    assert (status, err) == (0, [])
    assert out[1:-1] == printed(expected)
    said = [turn["content"] for turn in json.loads(path.read_text())["messages"]]
    assert said == ["Sort it.", "sort 21", expected[0], "reverse 12", expected[1]]


def test_settings_begin_with_the_models_own_and_are_asked_of_the_server(talk, lm):
    lines = ("/set", "/set threshold null", "/set steps 2", "sort 21", "/set seed 5")
    status, out, err = talk(*lines, sampler__eos_penalty="1", sampler__max_new_tokens="10")
    assert (status, err) == (0, [])
    assert {"steps 4  (default 128)", "threshold 0.99  (default null)", "eos_penalty 1.0  (default 0.0)"} < set(out)
    config = SamplerConfig(max_new_tokens=10, block_size=8, steps=2, eos_penalty=1.0)
    expected = printed(answers(lm, "sort 21", config=config))
    assert out[-1 - len(expected) :] == [*expected, "seed 5"]


def test_what_the_server_refuses_is_said_and_the_conversation_goes_on(talk, lm):
    settings = ("/set steps 0", "/set suppress_tokens [3]", "sort 21", "/set suppress_tokens []")
    status, out, err = talk(*settings, "9" * 600, "sort 21", "/html x.html")
    expected = printed(answers(lm, "sort 21"))
    assert status == 0 and out[-len(expected) :] == expected
    assert "steps: must be at least 1" in err[0]
    assert "diffusion.suppress_tokens" in err[1] and "can't be changed here" in err[1]
    assert "256" in err[2]
    assert "can't be replayed: load the model here" in err[3] and len(err) == 4


def test_a_gap_is_filled_and_several_are_refused(talk, lm):
    status, out, err = talk("sort [MASK:3] fox", "sort [MASK:2]", "[MASK] and [MASK]", "[MASK:0]")
    tokenizer, mask = lm.tokenizer, lm.spec.mask_token_id
    row = [*encoding.encode_plain(tokenizer, "sort "), mask, mask, mask, *encoding.encode_plain(tokenizer, " fox")]
    config = replace(CONFIG, max_new_tokens=3)
    filled = tokenizer.decode(Sampler(lm, config).infill([row]).completions[0], skip_special_tokens=True)
    expected = printed([f"sort {filled} fox"])
    assert status == 0 and out[: len(expected)] == expected
    assert err == [
        "error: a server fills one gap at a time, this text has 2: load the model here, with --model.path",
        "error: [MASK:0]: a gap has between 1 and 1,000,000 tokens",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"served_model": "large"}, "the server has no model 'large', only small"),
        ({"model.path": "x"}, "model.path: give model.path or url, not both"),
        ({"url": "http://127.0.0.1:9"}, "no server answers at http://127.0.0.1:9/v1"),
        ({"url": "here"}, "url: expected the address of a server"),
        ({"sampler.stepz": "3"}, "unknown option --sampler.stepz"),
        ({"sampler.steps": "0"}, "sampler.steps: must be at least 1"),
    ],
)
def test_bad_input_is_one_message(job, url, capsys, settings, message):
    words = {"url": url} | settings
    assert (
        run_job(job.ChatJob, job.main, "", [word for item in words.items() for word in (f"--{item[0]}", item[1])]) == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_server_that_fails_in_an_answer_leaves_the_conversation_as_it_was(job, monkeypatch, capsys):
    script = iter([[Refused("failed", "the model failed")], [Refused("full", "too many", retry_after_s=3.0)]])
    with served(create_app({"m": FakeBackend(lambda _: next(script))}, AppSettings())) as address:
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n/undo\n"))
        assert run_job(job.ChatJob, job.main, "", ["--url", address]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "error: the model failed",
        "error: too many (try again in 3 s)",
        "error: there is no question to take back",
    ]


def test_no_model_and_no_torch_is_loaded(url):
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    words = [sys.executable, "-c", code, str(JOB), "--url", url]
    done = subprocess.run(words, input="sort 21\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# --- on a terminal


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def page(monkeypatch) -> Console:
    """A terminal that what is drawn goes to."""
    page = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(terminal, "console", page)
    return page


@pytest.fixture
def at_terminal(job, page, monkeypatch, capsys):
    """Runs the job on what is typed; returns what was drawn, and the output."""

    def call(address: str, *typed: str | type[BaseException]) -> tuple[str, str, str]:
        monkeypatch.setattr(sys, "stdin", Keyboard())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        items = iter(typed)

        def type_in(_prompt: str) -> str:
            item = next(items, EOFError)
            if isinstance(item, str):
                return item
            raise item

        monkeypatch.setattr("builtins.input", type_in)
        assert run_job(job.ChatJob, job.main, "", ["--url", address]) == 0
        return page.file.getvalue(), *capsys.readouterr()

    return call


def test_an_answer_is_drawn_while_it_is_denoised(at_terminal, url, lm):
    drawn, out, err = at_terminal(url, "sort 21", "/show off", "sort 21")
    again = printed(answers(lm, "sort 21", "sort 21")[1:])
    assert "0 masks left" in drawn and "tokens per forward" in drawn and err == ""
    assert out.splitlines()[0] == "small: /help lists the commands, Ctrl-D ends."
    assert out.splitlines()[2 : 2 + len(again)] == again


def test_ctrl_c_drops_the_answer_and_cancels_it(at_terminal, monkeypatch, tmp_path):
    backend, update, path = FakeBackend(pause_s=0.02), LiveTexts.update, tmp_path / "chat.jsonl"
    steps = iter([False] * 6 + [False, True])  # a whole answer, then one that is interrupted at its second step

    def interrupted(drawing, *told):
        if next(steps, False):
            raise KeyboardInterrupt
        update(drawing, *told)

    monkeypatch.setattr(LiveTexts, "update", interrupted)
    with served(create_app({"fake": backend}, AppSettings())) as address:
        _, _, err = at_terminal(address, "hello there", "bye", f"/save {path}")
    assert "interrupted: the answer is dropped" in err
    assert len(json.loads(path.read_text())["messages"]) == 2 and len(backend.closed) == 1


def test_texts_are_drawn_as_they_were_written_edited_moved_and_ended(page):
    with LiveTexts("confidence") as drawing:
        for event in (
            Canvas(0, -1, 5, (0,), ("Hi ",), ()),
            Canvas(0, 0, 5, (1, 3), ("a", END), (0.9, 0.1)),
            Canvas(0, 1, 5, (1,), ("b\x1b[2J",), (0.8,), ("edit",)),
            Canvas(0, 2, 6, (1,), ("c ",), (0.7,), ("insert",)),
            Canvas(0, 3, 5, (0,), ("",), (0.0,), ("delete",)),
        ):
            drawing.update(event.step, event.length, event.positions, event.tokens, event.confidences, event.kinds)
        texts = drawing._texts()
        assert texts == ["c ", "b␛[2J", "░", END, "░"]
        assert [drawing._is_mask(place) for place in range(len(drawing))] == [False, False, True, False, True]
        assert drawing._written[1] == (1, 0.8) and drawing._edited == {1}
        drawing.finish()
    drawn = page.file.getvalue()
    assert "\x1b[2J" not in drawn and "step 4  0 masks left" in drawn and "1 edits" in drawn
