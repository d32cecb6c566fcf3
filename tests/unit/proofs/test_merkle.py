"""The Merkle tree, against the test data of Certificate Transparency and another implementation."""

import hashlib
import random

import pytest
import scitt_cose
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvmarket.proofs import ProofError, merkle
from vllm_kvmarket.proofs.log import StoredHashes

# Entries and roots of Certificate Transparency's reference tests (merkle_tree_test.cc).
CT_ENTRIES = [
    bytes.fromhex(each)
    for each in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


class Tree:
    """A tree in memory: every whole subtree in the order in which it was completed."""

    def __init__(self, entries=()):
        self.entries = []
        self.end = merkle.Frontier()
        self.stored = []
        for entry in entries:
            self.add(entry)

    def add(self, entry):
        self.entries.append(entry)
        self.stored += self.end.append(merkle.leaf_hash(entry))

    def read(self, level, number):
        return self.stored[merkle.stored_position(level, number)]


def made(count, seed=0):
    return Tree(random.Random(seed).randbytes(1 + number % 70) for number in range(count))


def hexes(items):
    return [item.hex() for item in items]


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_certificate_transparency(size):
    """The roots of the reference implementation's test data, from the end and from the subtrees."""
    tree = Tree(CT_ENTRIES)
    assert merkle.root(tree.read, size).hex() == CT_ROOTS[size]
    assert Tree(CT_ENTRIES[:size]).end.root().hex() == CT_ROOTS[size]


def test_a_path_is_certificate_transparency_s():
    """Leaf 0 of the eight: the published inclusion path."""
    tree = Tree(CT_ENTRIES)
    assert hexes(merkle.inclusion_path(tree.read, 0, 8)) == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_every_inclusion_proof_agrees_with_another_implementation(size):
    """scitt-cose makes the same paths and takes ours; we take nothing that it refuses."""
    tree = made(size)
    entries = hexes(tree.entries)
    root = merkle.root(tree.read, size)
    assert root.hex() == scitt_cose.merkle_root(entries)
    for index in range(size):
        path = merkle.inclusion_path(tree.read, index, size)
        assert hexes(path) == scitt_cose.inclusion_proof(entries, index)
        assert scitt_cose.verify_inclusion(entries[index], index, size, hexes(path), root.hex())
        leaf = merkle.leaf_hash(tree.entries[index])
        assert merkle.root_of_path(leaf, index, size, path) == root


@pytest.mark.parametrize("new", [1, 2, 3, 8, 21])
def test_every_consistency_proof_agrees_with_another_implementation(new):
    """From each size to each later one, made and verified by both."""
    tree = made(new)
    entries = hexes(tree.entries)
    for old in range(new + 1):
        path = merkle.consistency_path(tree.read, old, new)
        assert hexes(path) == scitt_cose.consistency_proof(entries, old, new)
        roots = merkle.root(tree.read, old), merkle.root(tree.read, new)
        assert scitt_cose.verify_consistency(*hexes(roots), old, new, hexes(path))
        merkle.verify_consistency(old, new, *roots, path)


@given(st.data())
def test_a_changed_inclusion_proof_is_refused_as_the_other_implementation_does(data):
    """Another index, size, leaf or path: both verdicts are the same, and only the truth is good."""
    size = data.draw(st.integers(1, 40))
    index = data.draw(st.integers(0, size - 1))
    tree = made(size)
    root = merkle.root(tree.read, size)
    path = merkle.inclusion_path(tree.read, index, size)
    said = data.draw(st.integers(0, size - 1))
    claimed = data.draw(st.integers(1, 45))
    change = data.draw(st.sampled_from(["nothing", "cut", "longer", "bit", "swap"]))
    wrong = list(path)
    if change == "cut":
        wrong = wrong[:-1]
    elif change == "longer":
        wrong.append(bytes(32))
    elif change == "bit" and wrong:
        wrong[0] = bytes([wrong[0][0] ^ 1]) + wrong[0][1:]
    elif change == "swap":
        wrong.reverse()
    entry = tree.entries[index]
    theirs = scitt_cose.verify_inclusion(entry.hex(), said, claimed, hexes(wrong), root.hex())
    try:
        ours = merkle.root_of_path(merkle.leaf_hash(entry), said, claimed, wrong) == root
    except ProofError:
        ours = False
    assert ours == theirs
    if (said, claimed, wrong) == (index, size, path):
        assert ours


@given(st.data())
def test_a_changed_consistency_proof_is_refused(data):
    """Only the path between these two trees is taken; the other implementation agrees."""
    new = data.draw(st.integers(2, 40))
    old = data.draw(st.integers(1, new))
    tree, forged = made(new), made(new, seed=1)
    path = merkle.consistency_path(tree.read, old, new)
    roots = merkle.root(tree.read, old), merkle.root(tree.read, new)
    merkle.verify_consistency(old, new, *roots, path)
    other = merkle.root(forged.read, old), merkle.root(forged.read, new)
    wrong = data.draw(
        st.sampled_from(
            [
                (old, new, other[0], roots[1], path),
                (old, new, roots[0], other[1], path),
                (old, new, *roots, [*path, bytes(32)]),
                (old, new, *roots, [bytes(32), *path]),
                (new, old - 1, *roots, path),
            ]
        )
    )
    old_said, new_said, first, second, said = wrong
    assert not scitt_cose.verify_consistency(
        first.hex(), second.hex(), old_said, new_said, hexes(said)
    )
    with pytest.raises(ProofError):
        merkle.verify_consistency(*wrong)


def test_the_empty_tree_is_the_beginning_of_every_log():
    """Its root is the hash of nothing; another root for it is refused."""
    tree = made(5)
    root = merkle.root(tree.read, 5)
    assert merkle.consistency_path(tree.read, 0, 5) == []
    merkle.verify_consistency(0, 5, hashlib.sha256(b"").digest(), root, [])
    with pytest.raises(ProofError):
        merkle.verify_consistency(0, 5, bytes(32), root, [])


@pytest.mark.parametrize(
    ("index", "size", "path"),
    [(5, 5, []), (-1, 5, []), (0, 0, []), (0, 2**62, [bytes(32)] * 100), (0, 2, [b"short"])],
)
def test_a_hostile_proof_is_refused_at_once(index, size, path):
    """Impossible sizes, endless paths, hashes of another length."""
    with pytest.raises(ProofError):
        merkle.root_of_path(bytes(32), index, size, path)


def test_the_file_of_hashes_grows_by_appending_only(tmp_path):
    """In whatever steps it grew, the file is the same; it is cut to the size that is durable."""
    tree = made(101)
    leaves = [merkle.leaf_hash(entry) for entry in tree.entries]
    path = tmp_path / "hashes"
    size = 0
    for step in (1, 1, 2, 13, 40, 44):
        with StoredHashes(path, size) as stored:
            stored.append(leaves[size : size + step])
            size = stored.size
            assert stored.root() == merkle.root(tree.read, size)
    assert path.read_bytes() == b"".join(tree.stored)
    with StoredHashes(path, 50) as stored:
        assert stored.root() == merkle.root(tree.read, 50)
    assert path.stat().st_size == 32 * merkle.stored_count(50)
    with StoredHashes(path, 80) as stored, pytest.raises(ProofError, match="shorter"):
        stored.root()
