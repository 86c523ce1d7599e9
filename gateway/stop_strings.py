"""Finds stop strings in text that arrives in pieces, and holds back just what may become one.

An automaton after Aho and Corasick ("Efficient string matching", 1975): the depth of its state is
the length of the longest suffix of the text that begins a stop string, which is exactly what must
be held back. Of several stop strings the one that is complete first wins, the longer at a tie, so
that the outcome does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    suffix: _Node | None = None  # the state of the longest proper suffix; None at the root
    stop: str | None = None  # the longest stop string that ends here


def _build(stops: Sequence[str]) -> _Node:
    root = _Node(depth=0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.children.setdefault(char, _Node(node.depth + 1))
        node.stop = stop
    _link(root)
    return root


def _link(root: _Node) -> None:
    """Sets every node's suffix and inherited stop string, in order of depth."""
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.children.items():
            child.suffix = root if node is root else _step(node.suffix or root, char)
            child.stop = child.stop or child.suffix.stop
            queue.append(child)


def _step(node: _Node, char: str) -> _Node:
    while char not in node.children:
        if node.suffix is None:
            return node
        node = node.suffix
    return node.children[char]


class StopStrings:
    """Passes text on, less what may be the beginning of a stop string, until one is complete.

    `matched` is the stop string that ended the text, or None. After a match nothing passes.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self.matched: str | None = None
        self._include = include
        self._node = _build(stops)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is certain by now. With `may_stop` False complete stop strings pass."""
        if self.matched is not None:
            return ""
        if not self._node.children and self._node.suffix is None:
            return text  # no stop strings at all
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._node = _step(self._node, char)
            if self._node.stop is not None and may_stop:
                return self._match(seen[:end], self._node.stop)
        certain = len(seen) - self._node.depth
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str, stop: str) -> str:
        self.matched = stop
        self._held = ""
        return text if self._include else text[: -len(stop)]
