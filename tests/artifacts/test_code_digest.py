"""The digest of a step's code: what counts, what does not, and what is followed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import code_digest
from artifacts.code_digest import CodeDigestError, code_closure

from .conftest import ROOT, write_files

FILES: dict[str, bytes | str] = {
    "pkg/__init__.py": "from pkg.facade import Everything\n",
    "pkg/facade.py": "import pkg.unrelated\nclass Everything: pass\n",
    "pkg/unrelated.py": "X = 1\n",
    "pkg/config.py": "import pkg.unrelated\nRANK = 16\n",
    "pkg/entry.py": (
        '"""Docstring."""\n'
        "from typing import TYPE_CHECKING\n"
        "import json, importlib\n"
        "import pkg.plain\n"
        "from pkg import config, sub\n"
        "from pkg.config import RANK\n"
        "from pkg.tools import helper, other as renamed\n"
        "from . import relative\n"
        "from .sub.inner import thing\n"
        "if TYPE_CHECKING:\n    from pkg import typing_only\n"
        "else:\n    import pkg.at_runtime\n"
        "def run(x: int = 1) -> str:\n"
        '    """Docstring."""\n'
        "    from pkg.inside import late  # comment\n"
        '    importlib.import_module("pkg.dynamic")\n'
        '    return f"{x!r:>{x}} {late}" + "page.html" + "é"\n'
    ),
    "pkg/page.html": "<html>",
    "pkg/plain.py": "import pkg.entry\n",
    "pkg/relative.py": "",
    "pkg/typing_only.py": "",
    "pkg/at_runtime.py": "",
    "pkg/inside.py": "late = 1\n",
    "pkg/dynamic.py": "",
    "pkg/sub/__init__.py": "FLAG = True\n",
    "pkg/sub/inner.py": "from ..deep import value\nthing = value\n",
    "pkg/deep.py": (
        "value = 1\n"
        "def syntax(x, /, *, y=None, **z):\n"
        "    match x:\n        case {'a': [1, *rest], **more} | None: pass\n"
        "    with (open(x) as a, open(y) as b): pass\n"
        "    try: pass\n    except* ValueError: pass\n"
        "    return f'a{x:>{y}}b' f'{x:}' 'c' f'{x=} {y = !s:>3}' f'{{}}{x:%Y-%m}' + '' + {**z, 'b': ['', x[1:, ...]]} + 1e400 + 2j\n"
    ),
    "pkg/tools/__init__.py": "from pkg.tools.first import helper\nfrom .second import other\nfrom .third import unused\n",
    "pkg/tools/first.py": "def helper(): pass\n",
    "pkg/tools/second.py": "from pkg.tools.base import *\nother = 1\n",
    "pkg/tools/base.py": "",
    "pkg/tools/third.py": "unused = 1\n",
}
FOLLOWED = {
    "entry", "entry:page.html", "plain", "sub", "sub.inner", "deep", "tools.first", "tools.second", "tools.base",
    "relative", "at_runtime", "inside", "dynamic",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path, FILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "pkg"


@pytest.fixture
def digest(tmp_path: Path, package: Path) -> Callable[..., str]:
    def compute(entry: str = "pkg.entry", cache_dir: Path | None = None) -> str:
        return code_digest([entry], packages=["pkg"], exclude=["pkg.config"], cache_dir=cache_dir)

    return compute


def test_exactly_what_the_entry_uses_is_followed_and_nothing_is_imported(package: Path):
    closure = code_closure(["pkg.entry"], packages=["pkg"], exclude=["pkg.config"], cache_dir=None)
    assert set(closure) == {f"pkg.{name}" for name in FOLLOWED}
    assert not [name for name in sys.modules if name == "pkg" or name.startswith("pkg.")]


def test_text_that_does_not_run_does_not_count(package: Path, digest: Callable[..., str]):
    before = digest()
    for name in ("entry.py", "tools/first.py", "deep.py"):
        path = package / name
        text = (
            path.read_text()
            .replace('"""Docstring."""', '"""Another text,\n\n    longer."""')
            .replace("# comment", "# other")
        )
        path.write_text(f"# A new comment.\n\n\n{text}\n\n# The end.\n")
    (package / "tools/first.py").write_text('def helper():\n    """Now documented."""\n    pass\n')
    for name in ("typing_only.py", "config.py", "unrelated.py", "facade.py", "__init__.py", "tools/third.py"):
        (package / name).write_text("changed = True\n")
    (package / "tools/__init__.py").write_text(f"import sys\n{FILES['pkg/tools/__init__.py']}")
    assert digest() == before


@pytest.mark.parametrize("name", sorted(FOLLOWED))
def test_a_change_of_any_followed_file_counts(package: Path, digest: Callable[..., str], name: str):
    before = digest()
    path = package / (name.partition(":")[2] or f"{name.replace('.', '/')}.py")
    path = path if path.exists() else package / name / "__init__.py"
    path.write_text(f"{path.read_text()}\ny = 2\n")
    assert digest() != before


def test_the_smallest_changes_count(package: Path, digest: Callable[..., str]):
    seen = {digest()}
    text = str(FILES["pkg/entry.py"])
    edits = [
        ("x: int = 1", "x: int = 2"),
        ("x: int = 1", "x: int = True"),
        ("x: int = 1", "x: int = 1.0"),
        ("x: int = 1", "x: int = '1'"),
        ("x: int = 1", "x: int = b'1'"),
        ("x: int = 1", "x: int = None"),
        ("x: int = 1", "x: int = ..."),
        ("!r:", "!s:"),
        ("def run", "async def run"),
        ("as renamed", "as other"),
        ("late}", "x}"),
    ]
    for old, new in edits:
        (package / "entry.py").write_text(text.replace(old, new))
        seen.add(digest())
    assert len(seen) == len(edits) + 1


def test_a_renamed_module_counts(package: Path, digest: Callable[..., str]):
    shutil.copy(package / "deep.py", package / "deeper.py")
    assert digest("pkg.deep") != digest("pkg.deeper")


def test_errors_name_the_module(package: Path, digest: Callable[..., str], tmp_path: Path):
    with pytest.raises(CodeDigestError, match=r"no module 'pkg\.nothing'"):
        digest("pkg.nothing")
    with pytest.raises(CodeDigestError, match="no package 'no_such_package'"):
        code_digest(["x"], packages=["no_such_package"], cache_dir=None)
    (package / "deep.py").write_text("def (:\n")
    with pytest.raises(CodeDigestError, match=r"deep\.py is not valid Python"):
        digest()


def test_the_cache_gives_the_same_digest_and_survives_damage(package: Path, digest: Callable[..., str], tmp_path: Path):
    cache = tmp_path / "cache"
    plain = digest()
    assert digest(cache_dir=cache) == digest(cache_dir=cache) == plain
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["version"] == 1
    file.write_text("{")
    assert digest(cache_dir=cache) == plain
    (package / "deep.py").write_text("value = 2\n")
    assert digest(cache_dir=cache) == digest() != plain


def test_modules_that_import_each_other_through_their_packages_end(tmp_path: Path, digest: Callable[..., str]):
    write_files(
        tmp_path,
        {
            "pkg/tools/__init__.py": "from pkg.sub import helper\n",
            "pkg/sub/__init__.py": "from pkg.tools import helper\n",
        },
    )
    assert len(digest()) == 64


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_digest_is_the_same_on_every_supported_python(package: Path, digest: Callable[..., str], version: str):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from artifacts.code_digest import code_digest\n"
        "print(sys.version_info[:2], code_digest(['pkg.entry'], packages=['pkg'], exclude=['pkg.config'], cache_dir=None))"
    )
    python = sys.executable if sys.version.startswith(version) else shutil.which(f"python{version}")
    arguments = ["-c", code, str(package.parent), str(ROOT)]
    result = python and subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if not result or result.returncode:
        pytest.skip(f"there is no Python {version} here")
    major, minor = version.split(".")
    assert result.stdout.split(") ") == [f"({major}, {minor}", f"{digest()}\n"]


def test_the_digest_is_fixed(digest: Callable[..., str]):
    # Ties Python versions together that are never on one machine; changing it makes every earlier result a miss.
    assert digest() == "6546a02e5ad4fc5e84998852ca8d4470ebc22b68c364ca448c6b80deb2d33d8c"


def test_the_project_takes_milliseconds_with_a_cache(tmp_path: Path):
    def seconds() -> float:
        start = time.perf_counter()
        closure = code_closure(["vlm.data.prepare"], cache_dir=tmp_path)
        assert "vlm.data.prepare" in closure
        assert not [name for name in closure if name.startswith(("vlm.config", "vlm.errors"))]
        return time.perf_counter() - start

    seconds()
    assert min(seconds() for _ in range(3)) < 0.25  # a few ms; the limit leaves room for a loaded machine
