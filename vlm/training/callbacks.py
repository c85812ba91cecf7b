"""What watches a training: the progress bar, the stop flag and the pace. Loads transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import TrainerCallback

from vlm.training.interrupt import StopFlag


class ProgressBar(TrainerCallback):
    """One bar over the steps, with the last loss; silent where nobody looks."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar at the step where the training goes on."""
        self._bar = tqdm(
            desc="training", total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advances."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the losses."""
        shown = {
            name: f"{logs[key]:.4g}"
            for name, key in (("loss", "loss"), ("validation", "eval_loss"))
            if key in (logs or {})
        }
        if self._bar is not None and shown:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Removes the bar, also after an error."""
        if self._bar is not None:
            self._bar.close()


class StopAtStepBoundary(TrainerCallback):
    """Asks for a checkpoint and an end once the flag is up."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Looks at the flag."""
        if self._flag.signum is not None:
            control.should_save = True
            control.should_training_stop = True
        return control


class Pace:
    """Tokens and samples per second since the last report, and the share of that time in which the next batch was not there.

    None of it asks the device.

    Args:
        tokens_of_step: Array of shape [steps]: tokens without padding.
        samples_of_step: Array of shape [steps]: rows.
    """

    def __init__(self, tokens_of_step: npt.NDArray[np.int64], samples_of_step: npt.NDArray[np.int64]) -> None:
        self._tokens, self._samples = tokens_of_step, samples_of_step
        self._step: int | None = None
        self._since = time.perf_counter()
        self._waited = 0.0

    def start(self, step: int) -> None:
        """Starts to count after a step."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Counts the time in which a training has to wait for its next batch.

        Args:
            batches: Gives one batch after the other.
        """
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def leave_out(self, seconds: float) -> None:
        """Takes time off the clock that was spent on something other than training."""
        self._since += seconds

    def report(self, step: int) -> dict[str, float]:
        """Figures from the last report to this step, and counts anew."""
        if self._step is None or step <= self._step:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        done = slice(self._step, step)
        figures = {
            "tokens_per_second": float(self._tokens[done].sum()) / seconds,
            "samples_per_second": float(self._samples[done].sum()) / seconds,
            "data_wait_share": self._waited / seconds,
        }
        self.start(step)
        return figures
