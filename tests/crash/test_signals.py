"""SIGTERM, as batch systems send it before they kill: training may end at once, and is resumed where it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests.crash.campaigns import check_recorded_files, check_same_record


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_terminated_training_is_resumed_bit_for_bit(workers, tmp_path, share):
    whole = workers.run("record", folder=tmp_path / "whole", watch=tmp_path / "whole" / "trajectory")
    root = tmp_path / "run"

    def terminate_later(process: int) -> None:
        threading.Timer(share * (whole.seconds or 0), os.kill, (process, signal.SIGTERM)).start()

    with pytest.raises(RuntimeError, match=f"ended with status {int(signal.SIGTERM)}"):
        workers.run("record", folder=root, watch=root / "trajectory", started=terminate_later)
    check_recorded_files(root / "trajectory")
    workers.run("record", folder=root, watch=root / "trajectory")
    check_same_record(root / "trajectory", tmp_path / "whole" / "trajectory")
