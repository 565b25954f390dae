"""SIGTERM, as batch systems send it before they kill: training may end at once, and is resumed where it was."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.crash.campaigns import check_recorded_files, check_same_record


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_terminated_training_is_resumed_bit_for_bit(workers, tmp_path, share):
    whole = workers.run("record", folder=tmp_path / "whole", watch=tmp_path / "whole" / "trajectory")
    root, checkpoints = tmp_path / "run", len(list((tmp_path / "whole").rglob("checkpoint-*")))
    assert whole.error is None and checkpoints > 3

    def terminate_later(process: int) -> None:
        """After a share of the checkpoints, and not of the time: how fast a second training is, nobody knows."""

        def watch() -> None:
            while len(list(root.rglob("checkpoint-*"))) < share * checkpoints:
                time.sleep(0.001)
            os.kill(process, signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    with pytest.raises(RuntimeError, match=f"ended with status {int(signal.SIGTERM)}"):
        workers.run("record", folder=root, watch=root / "trajectory", started=terminate_later)
    check_recorded_files(root / "trajectory")
    workers.run("record", folder=root, watch=root / "trajectory")
    check_same_record(root / "trajectory", tmp_path / "whole" / "trajectory")
