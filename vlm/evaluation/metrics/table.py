"""All metrics by name; `vlm.config.evaluation` has the same names."""

from __future__ import annotations

from vlm.config.evaluation import MetricName
from vlm.evaluation.metrics.answers import anls, exact, relaxed, token_f1
from vlm.evaluation.metrics.captions import chrf, rouge_l
from vlm.evaluation.metrics.edit_rates import character_edits, word_edits, word_mismatches
from vlm.evaluation.metrics.grounding import found_boxes, mean_iou
from vlm.evaluation.metrics.latex import latex_edits
from vlm.evaluation.metrics.metric import Metric, by_text
from vlm.evaluation.metrics.records import field_f1
from vlm.evaluation.metrics.trees import json_similarity
from vlm.evaluation.metrics.vqa import vqa_accuracy

METRICS: dict[MetricName, Metric] = {
    "cer": Metric(
        "Character error rate",
        "lower",
        by_text(character_edits, "lower"),
        "Inserted, deleted and substituted characters per target character.",
    ),
    "wer": Metric(
        "Word error rate",
        "lower",
        by_text(word_edits, "lower"),
        "Inserted, deleted and substituted words per target word.",
    ),
    "mer": Metric(
        "Match error rate",
        "lower",
        by_text(word_mismatches, "lower"),
        "Share of aligned words that do not match; never above 1.",
    ),
    "exact_match": Metric("Exact match", "higher", by_text(exact, "higher"), "Share of answers equal to the target."),
    "anls": Metric(
        "ANLS",
        "higher",
        by_text(anls, "higher"),
        "Mean similarity by characters, without case; under one half counts as none.",
    ),
    "vqa_accuracy": Metric(
        "VQA accuracy",
        "higher",
        vqa_accuracy,
        "Share of three people who gave the answer, at most 1, after the evaluation server's processing.",
    ),
    "relaxed_accuracy": Metric(
        "Relaxed accuracy",
        "higher",
        by_text(relaxed, "higher"),
        "Share of answers equal to the target, or within 5 % of it for numbers.",
    ),
    "token_f1": Metric(
        "Token F1",
        "higher",
        by_text(token_f1, "higher"),
        "Mean F1 of words, without case, punctuation and articles.",
    ),
    "field_f1": Metric(
        "Field F1",
        "higher",
        field_f1,
        "F1 over the fields of JSON answers, numbers and dates compared as such.",
    ),
    "json_similarity": Metric(
        "JSON tree similarity",
        "higher",
        json_similarity,
        "Mean of one minus the tree edit distance over the target's size (nTED).",
    ),
    "latex_edit_distance": Metric(
        "LaTeX edit distance",
        "lower",
        latex_edits,
        "Inserted, deleted and substituted LaTeX tokens over the longer formula's tokens.",
    ),
    "chrf": Metric("chrF", "higher", chrf, "Mean F-score of character n-grams up to 6, recall counting twice."),
    "rouge_l": Metric(
        "ROUGE-L", "higher", by_text(rouge_l, "higher"), "Mean F1 of the longest common subsequence of words."
    ),
    "grounding_iou": Metric("Mean IoU", "higher", mean_iou, "Intersection over union of expected and predicted boxes."),
    "grounding_accuracy": Metric(
        "Boxes found", "higher", found_boxes, "Share of boxes found with an intersection over union of at least 0.5."
    ),
}
