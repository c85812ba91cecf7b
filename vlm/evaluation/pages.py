"""What all pages have in common: templates that escape everything, and the files beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2
    import markupsafe


def template(name: str) -> jinja2.Template:
    """A template of this package. What it is given is escaped, and a name that it is not given is an error.

    Args:
        name: File name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def beside(name: str) -> str:
    """The text of a style sheet or script of this package.

    Args:
        name: File name.
    """
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def raw(text: str) -> markupsafe.Markup:
    """Text of our own, which a template shall not escape.

    Args:
        text: Never anything that came from outside.
    """
    import markupsafe

    return markupsafe.Markup(text)
