"""What changes over the training: learning rate and difficulty, by the share of it that is done."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from vlm.config.pretrain import CurriculumConfig, PretrainConfig


@dataclass(frozen=True)
class Difficulty:
    """How hard a line may be.

    Attributes:
        longest: Most characters.
        wear: From 0 (large and clean) to 1, see `vlm.pretrain.render`.
        figures: Share of lines that are digits alone.
    """

    longest: int
    wear: float
    figures: float


def difficulty(curriculum: CurriculumConfig, done: float) -> Difficulty:
    """The hardest lines at a moment.

    Args:
        curriculum: Settings.
        done: Share of the training, from 0 to 1.
    """
    grown = min(1.0, max(0.0, (done - curriculum.start) / (curriculum.end - curriculum.start)))
    longest = round(curriculum.first_longest * (curriculum.last_longest / curriculum.first_longest) ** grown)
    return Difficulty(longest, 0.1 + 0.9 * grown, curriculum.first_figures * (1 - grown))


def difficulty_of_line(curriculum: CurriculumConfig, done: float, choose: random.Random) -> Difficulty:
    """The difficulty of one line: the hardest of the moment, or at times that of an earlier one."""
    if choose.random() < curriculum.easy_share:
        done *= choose.random()
    return difficulty(curriculum, done)


def learning_rate(config: PretrainConfig, step: int, done: float) -> float:
    """Rises for some steps, then falls as a cosine.

    Args:
        config: Settings.
        step: Number of the step, from 0.
        done: Share of the training, from 0 to 1.
    """
    falling = config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.learning_rate * falling * min(1.0, (step + 1) / config.warmup_steps)
