import time
from collections.abc import Iterator

import numpy as np

from vlm.training.callbacks import Pace


def test_the_time_spent_waiting_for_batches_counts_by_stretch() -> None:
    def slow() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.05)
            yield number

    def seconds_waited(step: int) -> float:
        figures = pace.report(step)
        return figures["data_wait_share"] / figures["samples_per_second"]  # a sample a step

    pace = Pace(np.ones(3, np.int64), np.ones(3, np.int64))
    batches = slow()
    pace.start(0)
    assert next(pace.timed(batches)) == 0
    first = seconds_waited(1)
    assert next(pace.timed(batches)) == 1
    time.sleep(0.05)
    second = pace.report(2)
    # Sleeping takes no less than asked for, on a busy machine perhaps a lot more.
    assert first >= 0.05
    assert second["data_wait_share"] / second["samples_per_second"] >= 0.05
    assert second["data_wait_share"] < 1
    assert list(pace.timed(batches)) == []
    assert seconds_waited(3) < first  # nothing was left to wait for
