"""Hydra reads each file of conf/ and parses each override once in a process, not at each of the hundreds of
compositions that tests need. What is composed, and what is refused, is as before.
"""

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser


def parse_once() -> None:
    """Remember what is read and parsed in this process, and in those that are forked from it."""
    remember(ConfigRepository, "load_config", lambda self: tuple(map(str, self.sources)))
    remember(OverridesParser, "parse_rule", lambda _: ())


def remember(owner: type, name: str, describe: Callable[[Any], Hashable]) -> None:
    """Let a method return copies of what it first returned for an object as described and its arguments."""
    method, results = getattr(owner, name), {}

    @functools.wraps(method)
    def call(self: object, *arguments: str, **options: str) -> object:
        key = (describe(self), arguments, *options.items())
        if key not in results:
            results[key] = method(self, *arguments, **options)
        return copy.deepcopy(results[key])

    setattr(owner, name, call)
