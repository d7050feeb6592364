"""Several callers on one pool: whoever came first is served first, and what goes wrong for one is no affair of the
others."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing_testing import Death, LocalPool

from dllm_ray.errors import DataError, ResourceError
from dllm_ray.sharing import SharedPool

PATIENCE_S = 20


class Desk:
    """Work that begins when a worker is free and ends when it may; keeps the order in which it was begun."""

    def __init__(self):
        self.begun: list[str] = []
        self._may = threading.Semaphore(0)
        self._changed = threading.Condition()

    def __call__(self, _lm, name):
        with self._changed:
            self.begun.append(name)
            self._changed.notify_all()
        assert self._may.acquire(timeout=PATIENCE_S)
        return name.upper()

    def allow(self, number=1000):
        """So many pieces of work may end."""
        self._may.release(number)

    def wait_for(self, number):
        """Until so many have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= number, PATIENCE_S)


@pytest.fixture
def share():
    """Shares a pool of so many workers, and ends that."""
    opened = []

    def make(workers):
        opened.append(SharedPool(LocalPool([None] * workers)))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()


@pytest.fixture
def callers():
    """Threads that take all that a call gives."""
    with ThreadPoolExecutor(8) as threads:
        yield lambda pool, function, work: threads.submit(lambda: list(pool.run(function, work)))


def named(letter, number):
    return [(f"{letter}{index}",) for index in range(number)]


def until(true):
    """Waits for a callers' thread to come as far as that."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_caller_gets_what_each_call_returned_and_how_long_it_took(share):
    found = list(share(2).run(lambda _lm, a, b: a + b, [(1, 2), (3, 4), (5, 6)]))
    assert sorted(found) == [(0, 3, 1.0), (1, 7, 1.0), (2, 11, 1.0)]
    assert share(3).workers == 3


def test_no_work_no_answers(share):
    assert list(share(1).run(pytest.fail, [])) == []


def test_first_come_first_served(share, callers):
    pool, desk = share(1), Desk()
    first = callers(pool, desk, named("a", 3))
    desk.wait_for(1)
    second = callers(pool, desk, named("b", 2))
    until(lambda: len(pool._callers) == 2)
    desk.allow()
    assert [result for _, result, _ in first.result()] == ["A0", "A1", "A2"]
    assert [result for _, result, _ in second.result()] == ["B0", "B1"]
    assert desk.begun == ["a0", "a1", "a2", "b0", "b1"]


def test_workers_that_the_first_leaves_idle_go_to_the_next(share, callers):
    pool, slow, quick = share(2), Desk(), Desk()
    first = callers(pool, slow, named("a", 1))
    slow.wait_for(1)
    quick.allow()
    assert len(callers(pool, quick, named("b", 5)).result(PATIENCE_S)) == 5
    assert not first.done()
    slow.allow()
    assert first.result() == [(0, "A0", 1.0)]


def test_what_is_left_of_a_caller_who_stops_is_dropped(share):
    pool, desk = share(1), Desk()
    desk.allow(1)
    answers = pool.run(desk, named("a", 10))
    assert next(answers) == (0, "A0", 1.0)
    desk.wait_for(2)
    answers.close()
    desk.allow()
    assert [result for _, result, _ in pool.run(desk, named("b", 3))] == ["B0", "B1", "B2"]
    assert "a0" in desk.begun and len([name for name in desk.begun if name[0] == "a"]) <= 3  # one was under way


def test_a_workers_error_goes_to_its_caller_alone(share, callers):
    pool, desk = share(1), Desk()

    def fail(_lm, line):
        if line == 1:
            raise DataError("line 1 is broken")
        return line

    blocking = callers(pool, desk, named("a", 1))
    desk.wait_for(1)
    failing = callers(pool, fail, [(0,), (1,), (2,)])
    until(lambda: len(pool._callers) == 2)
    waiting = callers(pool, desk, named("c", 2))
    desk.allow()
    with pytest.raises(DataError, match="line 1 is broken"):
        failing.result()
    assert [len(blocking.result()), len(waiting.result())] == [1, 2]
    assert list(pool.run(lambda _lm: 7, [()])) == [(0, 7, 1.0)]


def test_dying_workers_are_told_to_all_callers_now_and_later(share, callers):
    pool, desk = share(2), Desk()

    def die(_lm):
        raise Death

    waiting = callers(pool, desk, named("a", 1))
    desk.wait_for(1)
    dying = callers(pool, die, [()])
    until(lambda: len(pool._callers) == 2 and not pool._callers[-1].todo)
    time.sleep(0.2)  # it has died by now, or else what waits may end well
    desk.allow()
    for caller in (dying, waiting, callers(pool, desk, named("c", 1))):
        with pytest.raises(ResourceError, match="workers keep dying"):
            caller.result(PATIENCE_S)


def test_callers_who_wait_when_the_pool_is_closed_get_an_error(share, callers):
    pool, desk = share(1), Desk()
    first = callers(pool, desk, named("a", 1))
    desk.wait_for(1)
    second = callers(pool, desk, named("b", 4))
    until(lambda: len(pool._callers) == 2)
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: pool._closed)
    desk.allow()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert first.result() == [(0, "A0", 1.0)]  # it was under way
    with pytest.raises(RuntimeError, match="closed"):
        second.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match="the pool is closed"):
        next(pool.run(desk, named("c", 1)))
    pool.close()


def test_the_pool_is_the_callers_again_after_closing():
    workers = LocalPool([None])
    SharedPool(workers).close()
    assert list(workers.run(lambda _lm, x: x, [(1,), (2,)])) == [(0, 1, 1.0), (1, 2, 1.0)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=30)
def test_everybody_gets_his_own_and_each_piece_once(pieces, workers):
    pool = SharedPool(LocalPool([None] * workers))
    done = []

    def note(_lm, caller, index):
        done.append((caller, index))
        return caller, index

    def ask(caller):
        return list(pool.run(note, [(caller, index) for index in range(pieces[caller])]))

    with ThreadPoolExecutor(len(pieces)) as threads:
        found = list(threads.map(ask, range(len(pieces))))
    pool.close()
    for caller, answers in enumerate(found):
        assert sorted(answers) == [(index, (caller, index), 1.0) for index in range(pieces[caller])]
    assert len(done) == len(set(done)) == sum(pieces)
