"""What other libraries offer, where they are installed; where they are not, the reason."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from benchmarks.harness import first_line


class Absent(Exception):
    """A rival that is not here; the message is the reason."""


def find(path: str) -> Any:
    """Import "module:name"; raise Absent if that does not work, for whatever reason."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # one that was built for another torch raises what it likes
        raise Absent(first_line(error)) from None


def find_all(paths: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What is installed of `paths` by its key, and the reasons why the others are missing."""
    found, absent = {}, {}
    for key, path in paths.items():
        try:
            found[key] = find(path)
        except Absent as reason:
            absent[key] = str(reason)
    return found, absent
