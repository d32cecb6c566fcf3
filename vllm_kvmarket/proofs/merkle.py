"""The Merkle tree of RFC 9162 over SHA-256: hashes, inclusion and consistency proofs; pure.

A tree is read as its whole subtrees: `read(level, number)` gives the hash over the 2**level leaves
from leaf `number` << level on. Whole subtrees never change when a tree grows, so that they can be
kept in an append-only file: behind each leaf's hash come those of the subtrees that it completes.
Source: https://www.rfc-editor.org/rfc/rfc9162#section-2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

from vllm_kvmarket.core.errors import ProofError

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
# An index of 64 bits has a path of at most as many hashes.
MAX_PATH = 64

Read = Callable[[int, int], bytes]


def leaf_hash(entry: bytes) -> bytes:
    """Hash an entry into its leaf; 32 bytes."""
    return sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash two subtrees into the one over both."""
    return sha256(b"\1" + left + right).digest()


def stored_count(size: int) -> int:
    """How many whole subtrees a tree of `size` leaves has, its leaves among them."""
    return 2 * size - size.bit_count()


def stored_position(level: int, number: int) -> int:
    """Where a whole subtree stands in the order in which they are completed."""
    last_leaf = ((number + 1) << level) - 1
    return stored_count(last_leaf) + level


class Frontier:
    """The growing end of a tree: its largest whole subtrees, from left to right."""

    def __init__(self, size: int = 0, subtrees: Iterable[bytes] = ()) -> None:
        self.size = size
        self._subtrees = list(subtrees)
        assert len(self._subtrees) == size.bit_count()

    def append(self, leaf: bytes) -> list[bytes]:
        """Grow by one leaf; the hashes of the leaf and of each subtree that it completes."""
        completed = [leaf]
        rest = self.size
        while rest & 1:
            leaf = sha256(b"\1" + self._subtrees.pop() + leaf).digest()
            completed.append(leaf)
            rest >>= 1
        self._subtrees.append(leaf)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The hash of the whole tree."""
        if not self._subtrees:
            return EMPTY_ROOT
        *others, root = self._subtrees
        for subtree in reversed(others):
            root = node_hash(subtree, root)
        return root


def frontier(read: Read, size: int) -> Frontier:
    """Read a tree's end, to go on from there."""
    subtrees, first = [], 0
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            subtrees.append(read(level, first >> level))
            first += 1 << level
    return Frontier(size, subtrees)


def root(read: Read, size: int) -> bytes:
    """The hash of the tree over the first `size` leaves."""
    return frontier(read, size).root()


def inclusion_path(read: Read, index: int, size: int) -> list[bytes]:
    """The hashes that lead from leaf `index` to the root of the tree of `size` leaves."""
    if not 0 <= index < size:
        raise ProofError(f"there is no leaf {index} in a tree of {size}")
    path: list[bytes] = []
    first, last = 0, size
    while last - first > 1:
        middle = first + _left_size(last - first)
        if index < middle:
            path.append(_range_hash(read, middle, last))
            last = middle
        else:
            path.append(_range_hash(read, first, middle))
            first = middle
    return path[::-1]


def consistency_path(read: Read, old: int, new: int) -> list[bytes]:
    """The hashes that show the tree of `old` leaves to be the beginning of that of `new`."""
    if not 0 <= old <= new:
        raise ProofError(f"a tree of {new} leaves has no beginning of {old}")
    if old in (0, new):
        return []
    path: list[bytes] = []
    first, last, left_edge = 0, new, True
    while last != old:
        middle = first + _left_size(last - first)
        if old <= middle:
            path.append(_range_hash(read, middle, last))
            last = middle
        else:
            path.append(_range_hash(read, first, middle))
            first, left_edge = middle, False
    if not left_edge:
        path.append(_range_hash(read, first, last))
    return path[::-1]


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that a leaf and its path lead to. Raises ProofError when they cannot be of one
    tree. Source: RFC 9162, section 2.1.3.2.
    """
    _check_hashes([leaf, *path])
    if not 0 <= index < size:
        raise ProofError(f"there is no leaf {index} in a tree of {size}")
    node, last, computed = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ProofError("the path is too long for its tree")
        if node & 1 or node == last:
            computed = node_hash(sibling, computed)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            computed = node_hash(computed, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise ProofError("the path is too short for its tree")
    return computed


def verify_consistency(
    old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]
) -> None:
    """Check that a tree is the beginning of another. Raises ProofError.

    Source: RFC 9162, section 2.1.4.2.
    """
    _check_hashes([old_root, new_root, *path])
    if not 0 <= old <= new:
        raise ProofError(f"a tree of {new} leaves has no beginning of {old}")
    if old in (0, new):
        beginning = EMPTY_ROOT if old == 0 else new_root
        if path or old_root != beginning:
            raise ProofError(f"the roots of {old} and {new} leaves are not of one log")
        return
    hashes = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not hashes:
        raise ProofError("the path is too short for its trees")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    old_computed = new_computed = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise ProofError("the path is too long for its trees")
        if node & 1 or node == last:
            old_computed = node_hash(sibling, old_computed)
            new_computed = node_hash(sibling, new_computed)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            new_computed = node_hash(new_computed, sibling)
        node, last = node >> 1, last >> 1
    if last or (old_computed, new_computed) != (old_root, new_root):
        raise ProofError(
            f"the log of {new} leaves does not begin with the one of {old}: its past was changed"
        )


def _left_size(size: int) -> int:
    """The largest power of two below `size`, which is 2 or more: how a tree is divided."""
    return 1 << (size - 1).bit_length() - 1


def _range_hash(read: Read, first: int, last: int) -> bytes:
    """Hash leaves first..last-1, which begin where a subtree of at least their number does."""
    size = last - first
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return read(level, first >> level)
    middle = first + _left_size(size)
    return node_hash(_range_hash(read, first, middle), _range_hash(read, middle, last))


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if len(hashes) > MAX_PATH + 2 or any(len(each) != HASH_BYTES for each in hashes):
        raise ProofError(f"a proof is made of at most {MAX_PATH} hashes of {HASH_BYTES} bytes")
