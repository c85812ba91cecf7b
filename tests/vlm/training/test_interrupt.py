import os
import signal
import threading

import pytest

from vlm.training.interrupt import StopFlag


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_flag_remembers_and_a_failed_block_restores_the_handler(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    flag = StopFlag()

    def fail() -> None:
        with flag:
            os.kill(os.getpid(), signum)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert flag.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_ctrl_c_does_not_wait() -> None:
    def press(times: int) -> None:
        with StopFlag():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        press(1)
    with pytest.raises(KeyboardInterrupt):
        press(2)


def test_a_signal_that_came_too_late_reaches_the_former_handler() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        with StopFlag():
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopFlag():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
