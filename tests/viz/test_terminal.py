"""What jobs draw: a line of progress, tables, and a canvas while it is denoised."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz import terminal
from dllm_ray.viz.spelling import Speller
from dllm_ray.viz.terminal import LiveCanvas, Progress, duration, table


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told: `clock.now += 5`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def on_a_terminal(monkeypatch) -> None:
    """From here on standard output says it is a terminal, 60 columns wide."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(terminal, "console", Console(width=60, highlight=False))


def screen(written: str) -> list[str]:
    """The lines a terminal shows: a carriage return goes back to the start of the line and writes over it."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


# --- progress


def test_plain_progress_is_whole_lines_now_and_then(clock, capsys):
    progress = Progress("training", total=100, unit="step")
    for done in range(1, 101):
        progress.update(done, loss=f"{done / 10}")
        clock.now += 1
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20  # after every 5 of 100 seconds
    assert lines[0] == "training: step 6/100  loss 0.6  1m34s left"
    assert lines[-1] == "training: step 100/100  loss 10.0"


def test_the_last_unit_is_always_shown(clock, capsys):
    Progress("reading", total=3, unit="file").update(3)
    assert capsys.readouterr().out == "reading: file 3/3\n"


def test_live_progress_is_one_line_drawn_over(clock, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    progress = Progress("training", total=20, unit="step")
    progress.update(1, loss="0.123456789012345678901234567")
    clock.now += 3
    progress.update(2, loss="0.1")
    assert screen(capsys.readouterr().out) == ["training: step 2/20  loss 0.1  54s left"]
    progress.close()
    progress.close()
    assert capsys.readouterr().out == "\n"


def test_a_note_stands_above_the_live_line(clock, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    progress = Progress("training", total=20, unit="step")
    progress.update(1)
    progress.note("saved")
    progress.update(2)
    assert screen(capsys.readouterr().out) == ["saved", "training: step 2/20  0s left"]


def test_a_note_in_plain_output_is_a_line(clock, capsys):
    Progress("training", total=20, unit="step").note("saved")
    assert capsys.readouterr().out == "saved\n"


def test_a_live_line_never_wraps(clock, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    Progress("training", total=20, unit="step").update(1, figure="9" * 200)
    [line] = screen(capsys.readouterr().out)
    assert len(line) == 59


def time_left(text: str) -> str:
    return text.splitlines()[-1].split("  ")[-1]


def test_time_left_is_measured_from_the_first_update(clock, capsys):
    progress = Progress("training", total=100, unit="step", done=40)
    clock.now += 1000  # start-up
    progress.update(50)
    assert "left" not in capsys.readouterr().out
    clock.now += 20
    progress.update(60)
    assert time_left(capsys.readouterr().out) == "1m20s left"  # 2 s a step, 40 to go


def test_time_left_is_measured_anew_after_a_restart(clock, capsys):
    progress = Progress("training", total=100, unit="step")
    progress.update(10)
    clock.now += 500
    progress.update(60)
    clock.now += 500
    progress.update(20)  # back at a checkpoint
    assert "left" not in capsys.readouterr().out.splitlines()[-1]
    clock.now += 10
    progress.update(30)
    assert time_left(capsys.readouterr().out) == "1m10s left"  # 1 s a step, 70 to go


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (41.6, "42s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (360_000, "100h00m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- tables


def test_a_table_shows_every_row_with_numbers_to_the_right(capsys):
    rows = [{"task": "gsm8k", "score": 0.123456, "n": 5}, {"task": "a", "score": 12.0, "n": 1319}]
    table("results", rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].strip() == "results"
    cells = [[cell for cell in line.split("│") if cell] for line in lines if "│" in line]
    assert cells == [[" gsm8k ", " 0.1235 ", "    5 "], [" a     ", "     12 ", " 1319 "]]
    [header] = [line for line in lines if "┃" in line]
    assert [name.strip() for name in header.split("┃") if name.strip()] == ["task", "score", "n"]


def test_rows_with_different_keys_stay_under_their_own_headings(monkeypatch):
    page = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", page)
    table("t", [{"task": "a", "first": 1}, {"task": "b", "second": 2}])
    lines = page.file.getvalue().splitlines()
    heading = next(line for line in lines if "first" in line)
    other = next(line for line in lines if "2" in line)
    assert heading.index("second") <= other.index("2") < heading.index("second") + len("second")


# --- a canvas where there is no terminal


@pytest.fixture
def log(monkeypatch):
    """A file of 40 columns in the place of a terminal."""
    log = Console(file=io.StringIO(), width=40)
    monkeypatch.setattr(terminal, "console", log)
    return log.file


def test_every_step_is_a_line_without_the_prompt(log, make_lm, tokenizer):
    spec = make_lm("bert").spec
    mask, end = spec.mask_token_id, spec.eos_token_id
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    with LiveCanvas(tokenizer, spec, [b, mask, mask, mask], prompt_length=1) as live:
        live.update(commit(0, {2: (a, 1.0)}))
        live.update(commit(1, {1: (b, 1.0), 3: (end, 1.0)}))
        live.update(commit(2, {}, done=True))
    assert log.getvalue().splitlines() == ["step   0  ░░░", "step   1  ░a░", "step   2  ba∎", "step   3  ba∎"]


def test_masks_left_at_the_end_lie_behind_the_text(log, make_lm, tokenizer):
    spec = make_lm("bert").spec
    [a] = ids_of(tokenizer, "a")
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 3) as live:
        live.update(commit(0, {0: (a, 1.0)}))
        live.update(commit(1, {1: (spec.eos_token_id, 1.0)}, done=True))
    assert log.getvalue().splitlines() == ["step   0  ░░░", "step   1  a░░", "step   2  a∎"]


def test_a_canvas_is_one_line_however_long_and_with_line_breaks(log, make_lm, tokenizer):
    spec = make_lm("bert").spec
    with LiveCanvas(tokenizer, spec, ids_of(tokenizer, "\n[b]") + [spec.mask_token_id] * 300):
        pass
    assert log.getvalue() == f"step   0  ⏎[b]{'░' * 300}\n"


# --- a live canvas


@pytest.fixture
def page(monkeypatch):
    """A terminal of 80 columns and 10 lines that keeps what is written to it."""
    page = Console(file=io.StringIO(), width=80, height=10, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(terminal, "console", page)
    return page


def plainly(text: str) -> str:
    """Without the codes that move a cursor or set a style."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def left_standing(page: Console) -> list[str]:
    """What stays on the terminal: all that comes after the last line that was taken back."""
    return plainly(page.file.getvalue().rpartition("\x1b[2K")[2]).rstrip("\n").split("\n")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def commit(step: int, written: dict[int, tuple[int, float]], done: bool = False) -> Commit:
    tokens, confidences = zip(*written.values(), strict=True) if written else ((), ())
    return Commit(0, step, list(written), list(tokens), list(confidences), done)


@pytest.mark.parametrize("colour", ["step", "confidence"])
def test_a_sampled_answer_stays_on_the_terminal(page, make_lm, tokenizer, colour):
    sampler = Sampler(make_lm("bert"), SamplerConfig(max_new_tokens=12, block_size=4, steps=6, seed=1))
    prompt = ids_of(tokenizer, "sort 21")
    [canvas] = sampler.canvases([prompt])
    with LiveCanvas(tokenizer, sampler.lm.spec, canvas, len(prompt), colour) as live:
        for step in sampler.stream([prompt]):
            live.update(step)
    tokens = sampler.sample([prompt]).sequences[0]
    text = "".join(Speller(tokenizer, sampler.lm.spec).spell(tokens)[len(prompt) :])
    *answer, status = left_standing(page)
    assert status.startswith("step 6  0 masks left") and status.endswith("tokens per forward")
    assert "".join("\n".join(answer).split()) == "".join(text.replace("\n", "⏎").split())


def test_tokens_are_coloured_by_step_and_edits_underlined(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 3) as live:
        live.update(commit(0, {0: (a, 0.9), 1: (b, 0.1)}))
        live.update(commit(1, {}))
        live.update(commit(2, {0: (c, 0.5), 2: (a, 0.9)}, done=True))
    final = page.file.getvalue().rpartition("\x1b[2K")[2]
    assert "\x1b[4;38;2;225;115;30mc\x1b[0m" in final  # newest, and an edit
    assert "\x1b[38;2;70;110;230mb\x1b[0m" in final  # oldest
    assert left_standing(page)[0] == "cba"
    status = left_standing(page)[-1]
    assert status.startswith("step 3  0 masks left") and status.endswith("1.00 tokens per forward  1 edits")


def test_tokens_are_coloured_by_confidence(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 2, colour="confidence") as live:
        live.update(commit(0, {0: (a, 1.0), 1: (b, 0.0)}, done=True))
    assert "\x1b[38;2;40;150;80ma" in page.file.getvalue()
    assert "\x1b[38;2;220;60;60mb" in page.file.getvalue()


def test_given_text_between_gaps_is_shown_and_the_prompt_is_not(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    with LiveCanvas(tokenizer, spec, [a, b, spec.mask_token_id, b], prompt_length=1) as live:
        live.update(commit(0, {2: (c, 1.0)}, done=True))
    assert left_standing(page)[0] == "bcb"


def test_an_answer_that_ends_early_shows_one_end_and_no_masks(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    [a] = ids_of(tokenizer, "a")
    end = spec.eos_token_id
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 6) as live:
        live.update(commit(0, {0: (a, 1.0), 1: (end, 1.0), 3: (end, 1.0)}, done=True))
    answer, status = left_standing(page)
    assert answer == "a∎" and status.startswith("step 1  0 masks left")


def test_an_answer_that_ends_with_the_sign_of_an_end_keeps_it(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    ids = tokenizer.encode("a∎", add_special_tokens=False)
    wrote = [*ids, spec.eos_token_id, spec.eos_token_id]
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * len(wrote)) as live:
        live.update(commit(0, {place: (token, 1.0) for place, token in enumerate(wrote)}, done=True))
    assert left_standing(page)[0] == "a∎∎"


def test_a_tall_canvas_is_drawn_around_what_is_new_and_whole_at_the_end(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    [line_break] = ids_of(tokenizer, "\n")
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    with LiveCanvas(tokenizer, spec, [a, line_break] * 30 + [spec.mask_token_id] + [line_break, a] * 30) as live:
        live.update(commit(0, {60: (b, 1.0)}, done=True))
        window = live._window().plain.split("\n")
    assert len(window) <= 9 and "b⏎" in window and window[-1].startswith("step 1")
    assert left_standing(page)[:-1] == ["a⏎"] * 30 + ["b⏎"] + ["a⏎"] * 29 + ["a"]


def test_a_burst_of_steps_is_not_drawn_step_by_step(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    [a] = ids_of(tokenizer, "a")
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 500) as live:
        for step in range(500):
            live.update(commit(step, {step: (a, 1.0)}, done=step == 499))
    assert page.file.getvalue().count("masks left") < 20
    assert "".join(left_standing(page)[:-1]) == "a" * 500


def test_what_a_model_writes_can_not_command_the_terminal(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    attack = ids_of(tokenizer, "\x1b]0;title\x07[bold]")
    with LiveCanvas(tokenizer, spec, [spec.mask_token_id] * len(attack)) as live:
        live.update(commit(0, {index: (token, 1.0) for index, token in enumerate(attack)}, done=True))
    assert "\x1b]" not in page.file.getvalue() and "\x07" not in page.file.getvalue()
    assert left_standing(page)[0] == "␛]0;title␇[bold]"


def test_an_interrupted_drawing_gives_the_terminal_back(page, make_lm, tokenizer):
    spec = make_lm("bert").spec
    with pytest.raises(KeyboardInterrupt), LiveCanvas(tokenizer, spec, [spec.mask_token_id] * 4):
        raise KeyboardInterrupt
    assert "\x1b[?25h" in page.file.getvalue()  # the cursor is back
    assert left_standing(page) == ["░░░░", "step 0  4 masks left"]
