"""Values that are made by the thousand in a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """A dataclass whose fields nobody sets once it is made, which the type checker sees to.

    `dataclass(frozen=True)` sees to it at run time too, and takes about six times as long to make
    one; a named tuple takes longer to make as well, and twice as long to read.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
