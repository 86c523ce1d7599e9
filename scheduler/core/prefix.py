"""Names for full blocks of tokens: equal names mean equal KV.

A name chains over everything that the KV of a block depends on: the model, the adapter, the
tenant's salt, the total length where the rope's scale follows it, and all tokens up to the block's
end. BLAKE2b with
128 bits, so that two tenants cannot be made to collide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

_DIGEST_BYTES = 16


def root_hash(model_identity: str, adapter: str, cache_salt: str, total_length: int) -> bytes:
    """The parent of a first block. `total_length` is 0 where KV does not depend on it."""
    digest = blake2b(digest_size=_DIGEST_BYTES, person=b"prefix root")
    for part in (model_identity, adapter, cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    digest.update(total_length.to_bytes(8, "little"))
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block that follows the block named `parent`."""
    digest = blake2b(parent, digest_size=_DIGEST_BYTES, person=b"prefix block")
    digest.update(array("Q", token_ids).tobytes())
    return digest.digest()


@dataclass(slots=True)
class HashChain:
    """The names of one sequence's full blocks, each computed once, when first asked for."""

    root: bytes
    block_size_tokens: int
    hashes: list[bytes] = field(default_factory=list)

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """At least the first `num_blocks` names of `token_ids`, which only ever grows."""
        size = self.block_size_tokens
        while len(self.hashes) < num_blocks:
            index = len(self.hashes)
            parent = self.hashes[-1] if self.hashes else self.root
            block = token_ids[index * size : (index + 1) * size]
            self.hashes.append(block_hash(parent, block))
        return self.hashes
