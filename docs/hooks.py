"""What the site does to the pages and docstrings that it is built from."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

REPOSITORY = "https://github.com/dscamiss/manic/blob/main/"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside ``docs`` lead to the repository."""
    markdown = re.sub(r"(!\[[^]]*\]\()\.\./([^)]+)", rf"\1{REPOSITORY}\2?raw=true", markdown)
    return markdown.replace("](../", f"]({REPOSITORY}")


class Examples(Extension):
    """A doctest under ``Example:`` is code, as one under ``Examples:`` is."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
