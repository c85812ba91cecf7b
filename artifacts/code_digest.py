"""Digest of a step's own code: its modules and all that they import from the project, found without importing.

Comments, docstrings, white space and positions do not count, because the digest is taken over the syntax tree.
The tree is written out here rather than with ``ast.dump``, whose text differs between Python versions; empty
fields are left out, so a field that a later Python adds does not change the digest.

What is followed, anywhere in a module, also inside functions:

- ``import vlm.x``: the module ``vlm.x``. Its parent packages run too, but they only re-export (the project's
  style), so they are not followed; otherwise each step would depend on everything.
- ``from vlm.x import y``: the submodule ``vlm.x.y`` where there is one. Where ``vlm/x/__init__.py`` takes ``y``
  from another module, that module alone; where it defines ``y`` itself, that ``__init__``.
- ``importlib.import_module("vlm.x")`` with a literal name.
- a file beside the module that a string names, such as ``"report.html.j2"``: its bytes count.

Imports under ``if TYPE_CHECKING`` never run and are not followed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import StoreError

# Raise when the serializer or the following of imports changes: it is part of every digest.
_VERSION = 1
_CACHE_FILE = "code-digests.json"
_MAX_CACHED = 4000


class CodeDigestError(StoreError, ValueError):
    """A module cannot be found or read as Python."""


@dataclass(frozen=True)
class _Source:
    """What one source file says, apart from where it lies.

    Attributes:
        digest: Digest of the syntax tree.
        imports: Imported names as [dots, module, name]; name is "" for ``import module``, "*" for all.
        rebound: Names that come from elsewhere as {name: [dots, module, original name]} (top level only).
        strings: Short strings that may name a file beside the module.
    """

    digest: str
    imports: list[list[Any]]
    rebound: dict[str, list[Any]]
    strings: list[str]


def code_digest(
    entry_modules: Sequence[str],
    *,
    packages: Sequence[str] = ("vlm",),
    exclude: Sequence[str] = ("vlm.config", "vlm.errors", "vlm.progress"),
    cache_dir: Path | None,
) -> str:
    """Returns the digest of some modules and of all project modules that they import, directly or not.

    Args:
        entry_modules: Full names, such as ``vlm.data.prepare``.
        packages: Top-level packages whose modules are followed.
        exclude: Modules and packages that do not count, such as those whose effect is in the key already.
        cache_dir: Where results per source text are kept, so that the next call costs milliseconds; None to keep none.

    Raises:
        CodeDigestError: If an entry module does not exist, or a module is not valid Python.
    """
    closure = code_closure(entry_modules, packages=packages, exclude=exclude, cache_dir=cache_dir)
    lines = [f"version {_VERSION}"] + [f"{name} {digest}" for name, digest in sorted(closure.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def code_closure(
    entry_modules: Sequence[str],
    *,
    packages: Sequence[str] = ("vlm",),
    exclude: Sequence[str] = ("vlm.config", "vlm.errors", "vlm.progress"),
    cache_dir: Path | None,
) -> dict[str, str]:
    """Returns the digest of each module (and file beside a module) that `code_digest` covers, by name.

    Raises:
        CodeDigestError: As `code_digest`.
    """
    cache = _Cache(cache_dir)
    finder = _Finder(packages, exclude, cache)
    for name in entry_modules:
        if finder.locate(name) is None:
            raise CodeDigestError(
                f"There is no module {name!r} in {', '.join(packages)}. Name the modules of the step by their full names."
            )
        finder.visit(name)
    cache.save()
    return finder.digests


class _Finder:
    """Follows imports from module to module."""

    def __init__(self, packages: Sequence[str], exclude: Sequence[str], cache: _Cache) -> None:
        self.digests: dict[str, str] = {}
        self._exclude = tuple(exclude)
        self._cache = cache
        self._located: dict[str, Path | None] = {}
        self._sources: dict[str, _Source] = {}
        self._resolving: set[tuple[str, str]] = set()
        self._roots = {package: _package_root(package) for package in packages}

    def locate(self, name: str) -> Path | None:
        """Returns the file of a module, or None if it is not of these packages."""
        if name not in self._located:
            package, *rest = name.split(".")
            path = None
            if (root := self._roots.get(package)) is not None:
                stem = root.joinpath(*rest)
                candidates = [stem / "__init__.py"] + ([stem.with_name(f"{stem.name}.py")] if rest else [])
                path = next((candidate for candidate in candidates if candidate.is_file()), None)
            self._located[name] = path
        return self._located[name]

    def visit(self, entry: str) -> None:
        """Adds a module and all that it imports."""
        waiting = [entry]
        while waiting:
            name = waiting.pop()
            path = self.locate(name)
            if name in self.digests or path is None or self._excluded(name):
                continue
            source = self._source(name, path)
            self.digests[name] = source.digest
            for text in source.strings:
                beside = path.parent / text
                if beside.is_file():
                    self.digests[f"{name}:{text}"] = hashlib.sha256(beside.read_bytes()).hexdigest()
            for dots, module, imported in source.imports:
                waiting.extend(self._targets(self._absolute(name, dots, module), imported))

    def _targets(self, module: str, imported: str) -> list[str]:
        """Returns the modules behind ``from module import imported`` (or ``import module``)."""
        path = self.locate(module)
        if path is None or self._excluded(module):
            return []
        if not imported or imported == "*" or path.name != "__init__.py":
            return [module]
        found = [submodule] if self.locate(submodule := f"{module}.{imported}") is not None else []
        if (module, imported) in self._resolving:
            return found  # two packages that re-export from each other
        rebound = self._source(module, path).rebound.get(imported)
        if rebound is not None:
            dots, origin, original = rebound
            self._resolving.add((module, imported))
            found += self._targets(self._absolute(module, dots, origin), original)
            self._resolving.discard((module, imported))
            return found  # from outside the packages, it is no code of ours
        return found or [module]

    def _source(self, name: str, path: Path) -> _Source:
        if name not in self._sources:
            self._sources[name] = self._cache.get(path)
        return self._sources[name]

    def _absolute(self, importer: str, dots: int, module: str) -> str:
        if not dots:
            return module
        path = self.locate(importer)
        parts = importer.split(".")
        up = dots - 1 if path is not None and path.name == "__init__.py" else dots
        base = parts[: len(parts) - up] if up else parts
        return ".".join([*base, module] if module else base)

    def _excluded(self, name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self._exclude)


class _Cache:
    """Results by the sha256 of the source text; a file in a folder, or nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / _CACHE_FILE if folder is not None else None
        self._known: dict[str, dict[str, Any]] = {}
        self._changed = False
        if self._file is not None:
            # A cache that cannot be read is made anew; it holds nothing that the sources do not say.
            with suppress(OSError, ValueError, RecursionError):
                stored = json.loads(self._file.read_bytes())
                if stored.get("version") == _VERSION:
                    self._known = stored["sources"]

    def get(self, path: Path) -> _Source:
        raw = path.read_bytes()
        key = hashlib.sha256(raw).hexdigest()
        if key in self._known:
            return _Source(**self._known[key])
        try:
            source = _read_source(raw)
        except SyntaxError as error:
            raise CodeDigestError(f"{path} is not valid Python: {error}.") from error
        self._known[key] = asdict(source)
        self._changed = True
        return source

    def save(self) -> None:
        if self._file is None or not self._changed:
            return
        newest = dict(list(self._known.items())[-_MAX_CACHED:])
        temporary = self._file.with_name(f"{_CACHE_FILE}.{os.getpid()}.{os.urandom(4).hex()}")
        with suppress(OSError):  # a folder that cannot be written only costs time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"version": _VERSION, "sources": newest}))
            os.replace(temporary, self._file)


def _package_root(package: str) -> Path:
    if "." in package:
        raise CodeDigestError(f"{package!r} is not a top-level package.")
    try:
        spec = importlib.util.find_spec(package)  # of a top-level name: imports nothing
    except ValueError:
        spec = None  # a module without a spec, such as __main__
    if spec is None or not spec.submodule_search_locations:
        raise CodeDigestError(f"There is no package {package!r} on the path of this Python.")
    return Path(next(iter(spec.submodule_search_locations)))


def _read_source(raw: bytes) -> _Source:
    tree = ast.parse(raw)
    _drop_docstrings(tree)
    imports: list[list[Any]] = []
    strings: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            imports += [[0, alias.name, ""] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [[node.level, node.module or "", alias.name] for alias in node.names]
        elif isinstance(node, ast.Call) and (literal := _imported_literal(node)):
            imports.append([0, literal, ""])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _may_name_a_file(node.value):
            strings.add(node.value)
        waiting.extend(node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node))  # type: ignore[attr-defined]
    unique = sorted({(dots, module, name) for dots, module, name in imports})
    digest = hashlib.sha256(_serialized(tree).encode("utf-8", "surrogatepass")).hexdigest()
    return _Source(digest, [list(item) for item in unique], _rebound_names(tree.body), sorted(strings))


def _rebound_names(body: Iterable[ast.stmt]) -> dict[str, list[Any]]:
    names = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = [node.level, node.module or "", alias.name]
    return names


def _imported_literal(call: ast.Call) -> str | None:
    function = call.func
    name = (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )
    if name in ("import_module", "__import__") and call.args and isinstance(call.args[0], ast.Constant):
        value = call.args[0].value
        if isinstance(value, str) and not value.startswith("."):
            return value
    return None


def _is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return getattr(test, "id", None) == "TYPE_CHECKING" or getattr(test, "attr", None) == "TYPE_CHECKING"


def _may_name_a_file(text: str) -> bool:
    return (
        2 < len(text) < 200
        and "." in text[1:-1]
        and text.isprintable()
        and not text.startswith("/")
        and ".." not in text
    )


def _drop_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                del node.body[0]


def _serialized(value: Any) -> str:
    if isinstance(value, ast.AST):
        fields = []
        for name in sorted(value._fields):
            item: Any = getattr(value, name, None)
            if isinstance(value, ast.JoinedStr):
                # Python 3.12 puts an empty text after a nested format specification; others do not.
                item = [part for part in item if not (isinstance(part, ast.Constant) and part.value == "")]
            # ctx follows from the place, kind is the u of u"…", type_ignores are comments
            if (
                (item is None and not isinstance(value, ast.Constant))
                or item == []
                or name in ("ctx", "kind", "type_ignores")
            ):
                continue
            fields.append(f"{name}={_serialized(item)}")
        return f"{type(value).__name__}({','.join(fields)})"
    if isinstance(value, list):
        return f"[{','.join(map(_serialized, value))}]"
    if type(value) is int:
        return hex(value)  # repr refuses very long numbers
    return f"{type(value).__name__}:{value!r}"
