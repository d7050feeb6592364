"""Continuous batching: who joins when, who leaves when, and that a row's tokens are its own whatever else runs."""

import dataclasses
import threading
import time
from collections import defaultdict

import pytest
import torch

from dllm_ray.errors import ConfigError
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.engine import Commit, Finished, Row
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.loop import Draining, Dropped, EngineLoop, QueueFull, _Room

CONFIG = SamplerConfig(max_new_tokens=12, block_size=4, steps=12, eos_early_stop=False)


class Watch:
    """Takes the events of rows and waits for their ends."""

    def __init__(self):
        self.events = defaultdict(list)
        self.order = []
        self._changed = threading.Condition()

    def of(self, name):
        def on_event(ticket, event):
            with self._changed:
                if not self.events[name]:
                    self.order.append(name)
                self.events[name].append(event)
                self._changed.notify_all()

        return on_event

    def end(self, name):
        """The last event of a row, once it came."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.events[name] and not self._goes_on(name), timeout=60)
            assert came, f"no end of {name}"
            return self.events[name][-1]

    def begun(self, name):
        with self._changed:
            assert self._changed.wait_for(lambda: self.events[name], timeout=60)

    def _goes_on(self, name):
        return isinstance(self.events[name][-1], Commit)


@pytest.fixture
def gate(sharp_lm):
    """A model whose forwards wait until they are let through: `gate.open()`, `gate.shut()`."""

    class Gate:
        lm = sharp_lm("llama")

        def __init__(self):
            self._open = threading.Event()
            self.broken = False
            self._hook = self.lm.model.register_forward_pre_hook(self._wait)
            self.open = self._open.set
            self.shut = self._open.clear

        def _wait(self, module, inputs):
            assert self._open.wait(60)
            if self.broken:
                raise RuntimeError("/a/path of the machine")

        def close(self):
            self._open.set()
            self._hook.remove()

    made = Gate()
    yield made
    made.close()


@pytest.fixture
def loop_of():
    loops = []

    def make(lm, observe=None, **limits):
        loops.append(EngineLoop(lm, Limits(**limits), observe))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


def a_row(lm, prompt=(40, 41), seed=0, **changes) -> Row:
    return Sampler(lm, dataclasses.replace(CONFIG, **changes)).rows([list(prompt)], [seed])[0]


def alone(lm, row: Row) -> list[int]:
    prompt = row.tokens[: row.open.index(True)]
    return Sampler(lm, row.config).sample([prompt], seeds=[row.seed]).sequences[0]


SETTINGS = [{}, {"cache": "prefix"}, {"cache": "dual", "cfg_scale": 0.7}, {"temperature": 1.0, "policy": "random"}]
SETTINGS += [{"cfg_scale": 0.5, "max_new_tokens": 5}, {"policy": "llada21", "threshold": 0.3}, {"steps_per_block": 1}]


def test_rows_of_many_threads_are_what_they_are_alone(sharp_lm, loop_of):
    lm = sharp_lm("llama")
    loop, watch = loop_of(lm, max_rows=3), Watch()
    rows = {number: a_row(lm, range(40, 42 + number), number, **SETTINGS[number % 7]) for number in range(14)}
    cancelled = {3, 8}

    def submit(numbers):
        for number in numbers:
            ticket = loop.submit(rows[number], f"client {number % 3}", watch.of(number))
            if number in cancelled:
                ticket.cancel()

    threads = [threading.Thread(target=submit, args=[range(first, 14, 2)]) for first in range(2)]
    for thread in threads:
        thread.start()
    ends = {number: watch.end(number) for number in rows}
    for thread in threads:
        thread.join()
    for number, end in ends.items():
        if number in cancelled and isinstance(end, Dropped):
            assert end.reason == "cancelled"
        else:
            assert end.tokens == alone(lm, rows[number])
            commits = watch.events[number][:-1]
            assert [commit.done for commit in commits] == [False] * (len(commits) - 1) + [True]
    figures = loop.figures()
    assert (figures.queued, figures.active) == (0, 0)
    assert figures.tokens >= sum(len(commit.positions) for n in rows for commit in watch.events[n][:-1])
    assert 1 <= figures.mean_batch <= 3 and figures.tokens_per_s > 0


def test_clients_take_turns_and_one_clients_rows_keep_their_order(gate, loop_of):
    loop, watch = loop_of(gate.lm, max_rows=1), Watch()
    loop.submit(a_row(gate.lm), "a", watch.of("first"))  # is active: the others wait
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        loop.submit(a_row(gate.lm), name[0], watch.of(name))
    gate.open()
    for name in ("a3", "b2", "c1"):
        assert isinstance(watch.end(name), Finished)
    assert [name for name in watch.order if name != "first"][-6:] in (
        ["a1", "b1", "c1", "a2", "b2", "a3"],
        ["b1", "c1", "a1", "b2", "a2", "a3"],
    )


def test_the_batch_is_bounded_in_rows_and_in_positions(sharp_lm, loop_of):
    lm, sizes = sharp_lm("llama"), []
    long, short = a_row(lm, range(40, 68)), a_row(lm, [40])  # 40 and 13 positions
    for limits, most in (({"max_rows": 2}, 2), ({"max_tokens": 39}, 3), ({"max_tokens": 30}, 2)):
        sizes.clear()
        loop, watch = loop_of(lm, lambda rows, tokens, seconds: sizes.append(rows), **limits), Watch()
        for number in range(6):
            loop.submit(short, "", watch.of(number))
        for number in range(6):
            watch.end(number)
        assert max(sizes) <= most
    sizes.clear()
    for number, row in enumerate((short, long, short)):
        loop.submit(row, "", watch.of(("mixed", number)))
    for number in range(3):
        assert isinstance(watch.end(("mixed", number)), Finished)
    assert len(sizes) == 36 and max(sizes) == 1  # the long one has it to itself; none overtakes it


def test_what_a_cache_keeps_is_bounded_too(sharp_lm, loop_of):
    lm = sharp_lm("llama")
    rows = [a_row(lm, range(40, 40 + size), cache="prefix") for size in (1, 2, 3, 30, 1, 2, 3)]
    expected = [alone(lm, row) for row in rows]  # beforehand: a model runs in one thread at a time
    loop, watch = loop_of(lm, max_tokens=60), Watch()
    for number, row in enumerate(rows):
        loop.submit(row, "", watch.of(number))
    for number, tokens in enumerate(expected):
        assert watch.end(number).tokens == tokens
        cache = loop._engine._cache
        assert cache is None or cache.slots * cache._width <= 2 * 60  # slots are doubled


def test_a_queue_has_room_for_so_many_calls_and_says_when_to_come_back(gate, loop_of):
    loop, watch = loop_of(gate.lm, max_rows=1, max_queue=2), Watch()
    loop.submit(a_row(gate.lm), "", watch.of("active"))
    while loop.figures().queued:
        time.sleep(0.001)
    rows = [a_row(gate.lm, seed=seed) for seed in range(3)]
    tickets = loop.submit_all(rows, "", [watch.of(seed) for seed in range(3)])  # one call
    loop.submit(rows[0], "", watch.of(3))
    began = time.perf_counter()
    with pytest.raises(QueueFull) as full:
        loop.submit(rows[0], "", watch.of("no"))
    with pytest.raises(QueueFull):
        loop.require_room()
    assert time.perf_counter() - began < 0.05
    assert 1 <= full.value.retry_after_s <= 60
    assert loop.figures().queued == 4
    for ticket in tickets:
        ticket.cancel()
    gate.open()
    assert isinstance(watch.end(3), Finished)
    assert watch.end(0) == Dropped("cancelled")
    assert not watch.events["no"]


def test_rows_leave_at_the_next_step_when_cancelled_or_late(gate, loop_of):
    loop, watch = loop_of(gate.lm, max_rows=2), Watch()
    cancelled = loop.submit(a_row(gate.lm), "", watch.of("cancelled"))
    loop.submit(a_row(gate.lm), "", watch.of("late"), deadline=time.time() + 0.05)
    while loop.figures().queued:
        time.sleep(0.001)
    loop.submit(a_row(gate.lm), "", watch.of("late in the queue"), deadline=time.time() + 0.05)
    loop.submit(a_row(gate.lm), "", watch.of("stays"), deadline=time.time() + 600)
    time.sleep(0.06)
    cancelled.cancel()
    gate.open()
    assert watch.end("cancelled").reason == "cancelled"
    assert watch.end("cancelled").so_far.nfe == 1
    assert watch.end("late").reason == "deadline"
    assert len(watch.events["late"]) == 2
    assert watch.end("late in the queue") == Dropped("deadline")
    assert watch.end("stays").tokens == alone(gate.lm, a_row(gate.lm))
    cancelled.cancel()  # is over: nothing happens
    assert loop.submit(a_row(gate.lm), "", watch.of("next")) and watch.end("next").tokens


def test_a_step_that_fails_takes_its_rows_along_and_the_loop_goes_on(gate, loop_of):
    loop, watch = loop_of(gate.lm, max_rows=2), Watch()
    for number in range(4):
        loop.submit(a_row(gate.lm), "", watch.of(number))
    while loop.figures().active < 1:
        time.sleep(0.001)
    gate.broken = True
    gate.open()
    dropped = watch.end(0)
    assert dropped.reason == "failed" and "path" not in dropped.message
    for number in range(4):
        watch.end(number)
    gate.broken = False
    loop.submit(a_row(gate.lm), "", watch.of("after"))
    assert watch.end("after").tokens == alone(gate.lm, a_row(gate.lm))
    assert loop.healthy


def test_logits_that_are_no_numbers_are_told(sharp_lm, loop_of):
    lm = sharp_lm("llama", seed=5)
    loop, watch = loop_of(lm), Watch()
    with torch.no_grad():
        weight = lm.model.get_output_embeddings().weight
        before = weight.clone()
        weight.fill_(float("nan"))
        for number in range(3):
            loop.submit(a_row(lm), "", watch.of(number))
            assert "NaN" in watch.end(number).message
        assert not loop.healthy
        weight.copy_(before)
    loop.submit(a_row(lm), "", watch.of("after"))
    assert isinstance(watch.end("after"), Finished)
    assert loop.healthy


def test_an_answer_whose_events_can_not_be_taken_is_let_go(sharp_lm, loop_of):
    lm = sharp_lm("llama")
    loop, watch = loop_of(lm), Watch()
    calls = []

    def broken(ticket, event):
        calls.append(event)
        raise KeyError("x")

    loop.submit(a_row(lm), "", broken)
    loop.submit(a_row(lm), "", watch.of("other"))
    assert watch.end("other").tokens == alone(lm, a_row(lm))
    assert len(calls) == 2 and calls[1].reason == "cancelled"


def test_bad_rows_are_refused_where_they_are_submitted(sharp_lm, loop_of):
    lm = sharp_lm("llama")
    loop, watch = loop_of(lm), Watch()
    with pytest.raises(ConfigError, match="vocabulary"):
        loop.submit(a_row(lm, [999]), "", watch.of("bad"))
    with pytest.raises(ConfigError, match="context"):
        loop.submit(a_row(lm, [40] * 60), "", watch.of("bad"))
    nothing = Sampler(lm, CONFIG).rows([[40, 41]], infill=True)[0]
    loop.submit(nothing, "", watch.of("nothing"))
    assert watch.end("nothing").tokens == [40, 41]
    assert not watch.events["bad"]


def test_draining_finishes_what_it_has_and_closing_does_not(gate, loop_of):
    loop, watch = loop_of(gate.lm, max_rows=1), Watch()
    for number in range(2):
        loop.submit(a_row(gate.lm), "", watch.of(number))
    assert not loop.drain(0.01)
    with pytest.raises(Draining):
        loop.submit(a_row(gate.lm), "", watch.of("no"))
    gate.open()
    assert loop.drain(60)
    assert isinstance(watch.end(1), Finished)
    assert loop.healthy and not loop.is_open

    gate.shut()
    loop = loop_of(gate.lm, max_rows=1)
    for name in ("active", "waiting"):
        loop.submit(a_row(gate.lm), "", watch.of(name))
    threading.Timer(0.05, gate.open).start()
    loop.close()
    assert watch.end("waiting").reason == "closed"
    assert not loop.healthy
    with pytest.raises(Draining):
        loop.require_room()


def test_an_idle_loop_sleeps(sharp_lm, loop_of):
    loop = loop_of(sharp_lm("llama"))
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.1
    assert loop.figures().steps == 0


def test_two_loops_share_a_model(sharp_lm, loop_of):
    lm, watch = sharp_lm("llama"), Watch()
    rows = [a_row(lm, range(40, 42 + number), number, **SETTINGS[number % 7]) for number in range(8)]
    expected = [alone(lm, row) for row in rows]
    loops = [loop_of(lm), loop_of(lm)]
    for number, row in enumerate(rows):
        loops[number % 2].submit(row, "", watch.of(number))
    assert [watch.end(number).tokens for number in range(8)] == expected


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_guided_row_takes_the_room_of_two(sharp_lm, cache):
    lm = sharp_lm("llama")
    plain, guided = (a_row(lm, cache=cache, cfg_scale=scale) for scale in (0.0, 0.5))
    for first, second, fits in ((plain, plain, True), (plain, guided, cache == "none"), (guided, guided, False)):
        room = _Room(Limits(max_tokens=3 * len(plain.tokens)))
        room.take(first)
        assert room.fits(second) is fits
