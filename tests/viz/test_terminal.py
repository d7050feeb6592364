"""What jobs draw: a line of progress, tables, and the steps of a denoising."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from dllm_ray.viz import terminal
from dllm_ray.viz.terminal import Progress, denoising, duration, table


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


# --- denoising


@pytest.fixture
def drawn(monkeypatch, tokenizer, make_lm):
    """Draws a history and returns its lines, plain and with the newly written text in [brackets]."""

    def draw(history, prompt_length):
        canvas = Console(record=True, file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
        monkeypatch.setattr(terminal, "console", canvas)
        denoising(tokenizer, make_lm("bert").spec, history, prompt_length)
        marked = canvas.export_text(styles=True, clear=False).replace("\x1b[2m", "").replace("\x1b[1;7m", "[")
        plain = canvas.export_text()
        return plain.splitlines(), [_brackets(line) for line in marked.splitlines()]

    return draw


def _brackets(line: str) -> str:
    parts = line.split("\x1b[0m")
    return "".join(part + "]" if "[" in part else part for part in parts)


def test_masks_ends_and_new_tokens_are_marked(drawn, tokenizer, make_lm):
    spec = make_lm("bert").spec
    mask, end = spec.mask_token_id, spec.eos_token_id
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    plain, marked = drawn([[b, mask, mask, mask], [b, mask, a, mask], [b, b, a, end], [b, b, a, end]], prompt_length=1)
    assert plain == ["step   0  ░░░", "step   1  ░a░", "step   2  ba∎", "step   3  ba∎"]
    assert marked == ["step   0  ░░░", "step   1  ░[a]░", "step   2  [b]a[∎]", "step   3  ba∎"]


def test_a_line_break_stays_on_its_line(drawn, tokenizer):
    [line_break] = tokenizer.encode("\n", add_special_tokens=False)
    plain, _ = drawn([[line_break]], prompt_length=0)
    assert plain == ["step   0  ⏎"]


def test_rows_with_different_keys_stay_under_their_own_headings(monkeypatch):
    page = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", page)
    table("t", [{"task": "a", "first": 1}, {"task": "b", "second": 2}])
    lines = page.file.getvalue().splitlines()
    heading = next(line for line in lines if "first" in line)
    other = next(line for line in lines if "2" in line)
    assert heading.index("second") <= other.index("2") < heading.index("second") + len("second")
