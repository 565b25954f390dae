from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.costs import SAMPLING_SECONDS, Meter, folder_bytes


def test_meter_sees_memory_that_is_gone_at_the_end():
    with Meter() as meter:
        block = np.ones(16 * 2**20)
        time.sleep(10 * SAMPLING_SECONDS)
        del block
        held = meter._process.memory_info().rss
    assert meter.peak_bytes >= 0.9 * 2**27
    assert held < 2**33


def test_meter_is_set_where_the_block_raises():
    meter = Meter()
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert meter.seconds >= 0
    assert not meter._thread.is_alive()


def test_meter_tells_processor_time_from_wall_time(monkeypatch):
    monkeypatch.setattr("time.process_time", iter([2.0, 5.5]).__next__)
    monkeypatch.setattr("time.perf_counter", iter([10.0, 20.0]).__next__)
    with Meter() as meter:
        pass
    assert (meter.seconds, meter.cpu_seconds) == (10.0, 3.5)


def test_folder_bytes(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "one").write_bytes(b"abc")
    (tmp_path / "inner" / "two").write_bytes(b"de")
    assert folder_bytes(tmp_path) == 5
