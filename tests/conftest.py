"""What all tests share: quiet, offline, and on their own folders."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports these packages: no network, no telemetry, no threads that spin while they wait.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    TOKENIZERS_PARALLELISM="false",
)
# Of a run in the background, Ctrl-C may be ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, so that a red test is the change's own fault; "deep" draws many new ones, by
# `pytest --hypothesis-profile deep` or HYPOTHESIS_PROFILE=deep. A loaded machine is slow, which says nothing about a test.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

PROJECT = Path(__file__).resolve().parents[1]

# Files that take minutes begin first, so that no worker is left with one of them while the others are idle; and those
# that share the flow's first run follow each other. Beginnings of paths.
_LONGEST_FIRST = (
    "tests/flows/test_vision_finetune",
    "tests/vlm/training/test_train",
    "tests/flows/",
    "tests/vlm/training/",
    "tests/vlm/export/",
    "tests/vlm/facade/",
    "tests/vlm/loading/",
    "tests/vlm/lora/",
    "tests/vlm/packing/",
    "tests/vlm/processing/",
)


def pytest_configure(config: pytest.Config) -> None:
    """With pytest-xdist: files in our order, not by their number of tests, of which the flow's long ones have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def _rank(item: pytest.Item) -> int:
    ranks = (rank for rank, start in enumerate(_LONGEST_FIRST) if item.nodeid.startswith(start))
    return next(ranks, len(_LONGEST_FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skips the tests of families that the installed transformers does not have yet."""
    items.sort(key=_rank)
    from vlm.families import FAMILIES

    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for model_type in (value for value in values if isinstance(value, str) and value in FAMILIES):
            from tests.support.tiny_models import is_available

            if not is_available(model_type):
                item.add_marker(pytest.mark.skip(reason=f"this transformers has no {model_type}"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps digests and downloads of the tests out of the user's cache."""
    os.environ["VISION_FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real OCR sets, where they lie beside the project; tests that need them are skipped elsewhere."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}")
    return folder
