"""The step's clock: what counts as waiting, in which pass, and that device stamps are read only once they are past."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.timing import StepClock, TimedExchange

CPU = torch.device("cpu")


class Sleeper:
    """A message that takes ``seconds``."""

    def __init__(self, seconds):
        self.seconds = seconds

    def post(self, sends, receives, what):
        return self

    def wait(self):
        time.sleep(self.seconds)


class Stream:
    """A device's clock in milliseconds. Work and stamps are queued; nothing happens before ``synchronize``."""

    def __init__(self):
        self.queue, self.now_ms = [], 0.0

    def work(self, milliseconds):
        self.queue.append(milliseconds)

    def event(self):
        return Event(self)

    def synchronize(self):
        for entry in self.queue:
            if isinstance(entry, Event):
                entry.passed_ms = self.now_ms
            else:
                self.now_ms += entry
        self.queue.clear()


class Event:
    def __init__(self, stream):
        self.stream, self.passed_ms = stream, None

    def record(self):
        self.passed_ms = None
        self.stream.queue.append(self)

    def elapsed_time(self, later):
        if self.passed_ms is None or later.passed_ms is None:
            raise RuntimeError("device not ready")
        return later.passed_ms - self.passed_ms


class StreamWait:
    """Waiting for a message as NCCL does it: the stream stops, the host goes on."""

    def __init__(self, stream, milliseconds):
        self.stream, self.milliseconds = stream, milliseconds

    def post(self, sends, receives, what):
        return self

    def wait(self):
        self.stream.work(self.milliseconds)


def test_waiting_is_told_apart_by_pass_and_only_inside_microbatches():
    clock = StepClock(CPU)
    clock.restart()
    short, long = TimedExchange(Sleeper(0.01), clock), TimedExchange(Sleeper(0.03), clock)
    long.post((), (), "before the first microbatch").wait()
    clock.gathered()
    clock.begin(4)
    short.post((), (), "forward").wait()
    clock.turn()
    clock.resume(4)
    long.post((), (), "backward").wait()
    long.post((), (), "backward").wait()
    clock.end()
    clock.reduced()
    times = clock.read()
    assert times.gather_s >= 0.03
    (only,) = times.microbatches
    assert only.microbatch == 4 and 0 <= only.start_s <= only.middle_s <= only.stop_s
    assert 0.01 <= only.forward_wait_s <= only.middle_s - only.start_s
    assert 0.06 <= only.backward_wait_s <= only.stop_s - only.middle_s
    assert only.compute_s == pytest.approx(only.stop_s - only.start_s - only.wait_s - only.away_s)


def one_step(clock, stream, *, wait_ms):
    clock.restart()
    stream.work(7)
    clock.gathered()
    for number, work_ms in ((0, 10), (3, 20)):
        clock.begin(number)
        stream.work(work_ms)
        TimedExchange(StreamWait(stream, wait_ms), clock).post((), (), "a message").wait()
        clock.turn()
        clock.resume(number)
        stream.work(2 * work_ms)
        TimedExchange(StreamWait(stream, 2 * wait_ms), clock).post((), (), "a message").wait()
        clock.end()
    stream.work(5)
    clock.reduced()


def test_device_times_are_the_streams_own_and_cost_no_synchronisation():
    stream = Stream()
    clock = StepClock(CPU, new_event=stream.event)
    one_step(clock, stream, wait_ms=4)
    assert stream.now_ms == 0, "recording a step must not make the device run dry"
    with pytest.raises(RuntimeError, match="not ready"):
        clock.read()
    stream.synchronize()
    times = clock.read()
    assert (times.gather_s, times.reduce_s) == pytest.approx((0.007, 0.005))
    first, second = times.microbatches
    assert (first.start_s, first.middle_s, first.stop_s) == pytest.approx((0.0, 0.014, 0.042))
    assert (second.start_s, second.stop_s) == pytest.approx((0.042, 0.042 + 0.072))
    assert (second.forward_wait_s, second.backward_wait_s) == pytest.approx((0.004, 0.008))
    assert times.compute_s == pytest.approx(0.090)
    assert times.finish_s == pytest.approx(0.114)


def test_between_forward_and_backward_a_pipeline_stage_runs_other_microbatches():
    stream = Stream()
    clock = StepClock(CPU, new_event=stream.event)
    clock.restart()
    clock.gathered()
    for number, work_ms in ((0, 10), (1, 20)):
        clock.begin(number)
        stream.work(work_ms)
        clock.turn()
    for number, work_ms in ((0, 30), (1, 40)):
        clock.resume(number)
        TimedExchange(StreamWait(stream, 5), clock).post((), (), "a gradient").wait()
        stream.work(work_ms)
        clock.end()
    clock.reduced()
    stream.synchronize()
    first, second = clock.read().microbatches
    assert (first.away_s, second.away_s) == pytest.approx((0.020, 0.035))
    assert (first.compute_s, second.compute_s) == pytest.approx((0.040, 0.060))
    assert (first.backward_wait_s, first.forward_wait_s) == pytest.approx((0.005, 0.0))


def test_events_are_made_once_and_used_again():
    stream, made = Stream(), []

    def new_event():
        made.append(stream.event())
        return made[-1]

    clock = StepClock(CPU, new_event=new_event)
    for wait_ms in (4, 1, 9):
        one_step(clock, stream, wait_ms=wait_ms)
        stream.synchronize()
        assert clock.read().wait_s == pytest.approx(6 * wait_ms / 1000)
    assert len(made) == 3 + 2 * (4 + 4)


def test_a_rank_without_microbatches_and_a_step_cut_short():
    clock = StepClock(CPU)
    clock.restart()
    clock.gathered()
    clock.begin(0)  # an exception ends the step here
    clock.restart()
    clock.gathered()
    clock.reduced()
    times = clock.read()
    assert (times.microbatches, times.finish_s, times.wait_s) == ((), 0.0, 0.0)
    assert times.gather_s >= 0 and times.reduce_s >= 0
