import threading

import pytest

from hf_rgm.recording.writer import BackgroundWriter


def test_work_is_done_in_order_by_another_thread():
    writer, done = BackgroundWriter(), []
    for number in range(20):
        writer.submit(lambda number=number: done.append((number, threading.get_ident())))
    writer.drain()
    numbers, threads = zip(*done, strict=True)
    assert numbers == tuple(range(20))
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads
    writer.close()


def test_no_more_than_allowed_is_pending():
    writer, done, goes_on = BackgroundWriter(max_pending=2), [], threading.Event()
    for number in range(2):
        writer.submit(lambda number=number: (goes_on.wait(10), done.append(number)))
    timer = threading.Timer(0.2, goes_on.set)
    timer.start()
    writer.submit(lambda: done.append(2))  # waits for the first
    assert goes_on.is_set()
    assert done[0] == 0
    writer.drain()
    assert done == [0, 1, 2]
    writer.close()


@pytest.mark.parametrize("method", ["submit", "check", "drain"])
def test_an_error_is_raised_by_the_next_call_and_nothing_follows_it(method):
    writer, done, began = BackgroundWriter(), [], threading.Event()

    def fail():
        began.wait(10)
        raise OSError("disk full")

    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    began.set()
    while method != "drain":
        # Neither of these waits: the error comes once the work has failed.
        try:
            writer.submit(lambda: done.append(2)) if method == "submit" else writer.check()
        except OSError as error:
            assert str(error) == "disk full"
            break
    else:
        with pytest.raises(OSError, match="disk full"):
            writer.drain()
    writer.close()
    assert done == []


def test_closing_waits_and_raises_nothing():
    writer, done = BackgroundWriter(), []
    writer.submit(lambda: done.append(1))
    writer.submit(lambda: 1 / 0)
    writer.close()
    assert done == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hf-rgm-writer")]
