import pytest
from pydantic import ValidationError

from vlm.config import EvaluationConfig
from vlm.config.evaluation import TASK_METRICS, MetricName, TaskName
from vlm.evaluation.metrics import METRICS, cleaner, value

# A right answer of every metric's kind, and one that has nothing in common with it.
ANSWERS = {
    "field_f1": ('{"total": "7"}', "none"),
    "json_similarity": ('{"total": "7"}', "none"),
    "grounding_iou": ("[1, 2, 3, 4]", "nowhere"),
    "grounding_accuracy": ("[1, 2, 3, 4]", "nowhere"),
}


def test_the_configuration_and_the_table_have_the_same_names() -> None:
    assert set(MetricName.__args__) == set(METRICS)
    assert set(TaskName.__args__) == set(TASK_METRICS)
    assert {name for names in TASK_METRICS.values() for name in names} <= set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_right_answers_are_best_and_wrong_ones_worst(name: MetricName) -> None:
    right, wrong = ANSWERS.get(name, ("abcd", "xyzw"))
    clean = cleaner(EvaluationConfig())
    best, worst = (1, 0) if METRICS[name].better == "higher" else (0, 1)
    assert value(METRICS[name].score([right], right, clean)) == best
    assert value(METRICS[name].score([right], wrong, clean)) == worst
    # One right reference among others is enough; nine people of ten are, too.
    assert (
        value(METRICS[name].score([right, right, right, right, ANSWERS.get(name, ("other",))[0]], right, clean)) == best
    )
    # Any prediction is scored, whatever it is.
    for odd in ("", "\x00", "[" * 5000, "🎉" * 40, "{}", "0", "[1, 2", "\ud800"):
        assert value(METRICS[name].score([right], odd, clean)) >= 0


def test_the_task_names_the_metrics_unless_they_are_named() -> None:
    assert EvaluationConfig().metric_names == ("cer", "wer", "exact_match")
    assert EvaluationConfig(task="vqa").metric_names[0] == "vqa_accuracy"
    assert EvaluationConfig(task="vqa", metrics=("anls",)).metric_names == ("anls",)
    with pytest.raises(ValidationError, match="names something twice"):
        EvaluationConfig(metrics=("cer", "cer"))
