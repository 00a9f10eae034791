"""What several compressions of one layer of one prompt have in common, computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Shared:
    """Results by what they depend on, beside the layer's own states; no result may be changed in place."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, dependence: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of `compute`, or the one that an equal `dependence` gave before."""
        if dependence not in self._found:
            self._found[dependence] = compute()
        return self._found[dependence]

    def drop_all(self, *names: str) -> None:
        """Forget the results of these names, with whatever else they depend on, so that their memory is free."""
        for dependence in list(self._found):
            if (dependence[0] if isinstance(dependence, tuple) else dependence) in names:
                del self._found[dependence]
