"""Progress lines: silent when quick, rate and time left when not, and a resumed start does not count as speed."""

import io

from leaml_plugin import progress
from leaml_plugin.progress import Progress, duration, track


def test_duration():
    assert [duration(s) for s in (0, 61, 3661.9)] == ["0:00", "1:01", "1:01:01"]


def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_quick_work_prints_nothing(monkeypatch):
    now, out = clock(monkeypatch), io.StringIO()
    bar = Progress("x", 3, stream=out)
    for _ in range(3):
        now[0] += 0.1
        bar.update()
    bar.close()
    assert out.getvalue() == ""


def test_rate_counts_only_this_run_and_time_left_follows(monkeypatch):
    now, out = clock(monkeypatch), io.StringIO()
    bar = Progress("train", 100, unit="step", start=40, stream=out, every=1.0)
    for _ in range(10):
        now[0] += 0.5
        bar.update(note="loss 1.0")
    first = out.getvalue().splitlines()[0]
    assert first == "train 44/100 (2.0 step/s, 0:28 left) loss 1.0"
    bar.close()
    assert "50/100" in out.getvalue().splitlines()[-1]


def test_track_takes_the_length():
    assert list(track([1, 2, 3], "x")) == [1, 2, 3]
    assert list(track(iter("ab"), "x", total=2)) == ["a", "b"]
