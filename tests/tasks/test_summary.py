from __future__ import annotations

from tasks.summary import metric_rows, report_markdown
from tasks.tracking import viewer

SUMMARY = {
    "metrics": {
        "num_rows": 8,
        "split": "test",
        "metrics": {
            "cer": {
                "better": "lower",
                "tuned": {"value": 0.1, "low": 0.05, "high": 0.2},
                "base": {"value": 0.5, "low": 0.4, "high": 0.6},
                "difference": {"value": -0.4, "low": -0.5, "high": -0.3, "p_value": 0.01},
            },
            "wer": {
                "better": "lower",
                "tuned": {"value": 0.3, "low": 0.2, "high": 0.4},
                "base": None,
                "difference": None,
            },
        },
        "failures": {"empty": {"tuned": 1, "base": None}, "repetition": {"tuned": 0, "base": 0}},
    },
    "locations": {"report": "runs/latest/report/report.html"},
}


def test_rows_of_the_table_say_what_is_clear() -> None:
    cer, wer = metric_rows(SUMMARY)
    assert (cer["tuned"], cer["base"], cer["difference"], cer["tuned is"]) == (0.1, 0.5, -0.4, "better")
    assert cer["difference interval"] == "[-0.5000, -0.3000]"
    assert (wer["base"], wer["tuned is"]) == (None, None)


def test_the_short_report_holds_figures_failures_and_places() -> None:
    lines = report_markdown(SUMMARY).splitlines()
    assert (
        "| cer (lower is better) | 0.1 [0.0500, 0.2000] | 0.5 [0.4000, 0.6000] | -0.4 [-0.5000, -0.3000] | better |"
        in lines
    )
    assert "| wer (lower is better) | 0.3 [0.2000, 0.4000] | – | – | – |" in lines
    assert "| empty | 1 | – |" in lines
    assert not any("repetition" in line for line in lines)
    assert lines[-1] == "- report: `runs/latest/report/report.html`"


def test_runs_on_a_server_are_looked_at_there() -> None:
    assert viewer("https://mlflow.example.org/team") == "https://mlflow.example.org/team"
    assert viewer("sqlite:///runs/mlflow.db") == "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"
