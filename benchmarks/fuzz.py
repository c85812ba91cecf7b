"""Feeds the readers of what others wrote with broken input, guided by coverage, for as long as one likes.

    pip install atheris
    python benchmarks/fuzz.py --minutes 30 [--targets image,arrow] [--corpus FOLDER]

Each target runs in a process of its own, so that a crash of a native decoder is found, too. What a target promises to raise
is fine, and everything else is written to ``FOLDER/<target>/crash-…`` with its traceback; the corpus is kept and grown.
Targets and seeds are those of ``tests/support/hostile.py``.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
# Beyond this an input has taken the memory of the machine rather than an error's.
MEMORY_BYTES = 6 << 30


def main() -> int:
    """Runs every target for its share of the time; the exit status is the number of targets that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--targets", help="names with commas; all without it")
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "vision-finetune-fuzz")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.one:
        return run_target(options.one, options.corpus, rest)
    from tests.support.hostile import targets

    with tempfile.TemporaryDirectory() as folder:
        names = options.targets.split(",") if options.targets else list(targets(Path(folder)))
    failed = 0
    for name in names:
        (options.corpus / name).mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, __file__, "--one", name, "--corpus", str(options.corpus),
            str(options.corpus / name), f"-max_total_time={options.minutes * 60 / len(names):.0f}", "-max_len=4096",
            "-timeout=20", "-rss_limit_mb=6144", f"-artifact_prefix={options.corpus / name}/../{name}-",
            "-print_final_stats=1", "-verbosity=0",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        output = (done.stdout + done.stderr).splitlines()
        stats = [line.split("::")[1] for line in output if line.startswith("stat::number_of_executed_units")]
        failed += done.returncode != 0
        print(f"{name:10} {'ok' if done.returncode == 0 else f'FAILED ({done.returncode})':12} {', '.join(stats)}")
        if done.returncode:
            print("\n".join(output[-40:]))
        sys.stdout.flush()
    return failed


def run_target(name: str, corpus: Path, arguments: list[str]) -> int:
    """Fuzzes one target in this process."""
    import atheris

    resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY_BYTES, 2 * MEMORY_BYTES))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["PIL", "yaml", "vlm", "flows", "artifacts", "pydantic"]):
        from tests.support.hostile import targets
    with tempfile.TemporaryDirectory() as folder:
        target = targets(Path(folder))[name]
        for number, seed in enumerate(target.seeds):
            (corpus / name / f"seed-{number}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *arguments], target.run)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
