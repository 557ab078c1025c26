"""Warnings that point to the user's line, however many frames of ours, and of torch's, are between."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside manic and torch that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("manic", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class Once:
    """Warns of each thing once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn(self, what: str, message: str, category: type[Warning] = UserWarning) -> None:
        """`warn`, unless it was called with the same ``what`` before."""
        if what not in self._told:
            self._told.add(what)
            warn(message, category)
