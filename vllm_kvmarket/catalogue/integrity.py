"""The catalogue's invariants as code: between listings, chunks and tree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.listing import NEEDED, Listing
from vllm_kvmarket.catalogue.prefix_tree import Node, PrefixTree
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import TOKEN_BYTES, keeps_states, unpack_tokens


def problems(db: Connection, tree: PrefixTree, now_s: float, *, whole: bool = True) -> list[str]:
    """Return what is wrong, a line each; the tree must be as new as the database, and as of now.

    Unless it is to be `whole`, the database itself must have what documents may be missing in it.
    """
    found: list[str] = []
    on_offer: set[str] = set()
    for listing in queries.read_listings(db):
        chunks = queries.chunks_of(db, listing.document_id)
        found += [
            f"{listing.document_id}: {problem}"
            for problem in _listing_problems(listing, chunks, tree, now_s, whole=whole)
        ]
        if not whole:
            found += _offer_problems(db, listing, chunks)
        if queries.matchable(listing, chunks, now_s):
            on_offer.add(listing.document_id)
    found += [
        f"{name}: can be matched, but is not on offer" for name in tree.entries.keys() - on_offer
    ]
    return found + list(tree_problems(tree))


def _listing_problems(
    listing: Listing,
    chunks: list[queries.StoredChunk],
    tree: PrefixTree,
    now_s: float,
    *,
    whole: bool,
) -> Iterator[str]:
    if not chunks and listing.state not in NEEDED:
        # Its tokens were removed.
        return
    tokens = unpack_tokens(b"".join(chunk.tokens for chunk in chunks))
    if len(tokens) != listing.token_count:
        yield f"{len(tokens)} tokens stored, {listing.token_count} listed"
    document = DocumentChunks.of(listing.namespace, tokens, tree.chunk_tokens)
    if document.keys != listing.chunk_keys:
        yield "its chunk keys do not follow from its tokens"
    elif not document.keys or document.document_id != listing.document_id:
        yield "its id does not follow from its tokens"
    damaged = any(chunk.damaged for chunk in chunks)
    if listing.state == "live" and damaged:
        yield "live, with a damaged chunk"
    if listing.state == "damaged" and not damaged:
        yield "damaged, with every chunk whole"
    entry = tree.entries.get(listing.document_id)
    in_tree = tuple(node.tokens for node in entry.path[1:]) if entry else ()
    if (whole or entry) and in_tree != queries.matchable(listing, chunks, now_s):
        yield f"{listing.state}, but what can be matched of it is something else"


def _offer_problems(
    db: Connection, listing: Listing, chunks: list[queries.StoredChunk]
) -> Iterator[str]:
    """Compare what is matched in the database with what should be; time to live does not matter."""
    if keeps_states(listing.namespace):  # matched in memory only
        return
    held = queries.rows(
        db,
        "SELECT followed.key FROM followed JOIN listing USING (document_id) "
        "JOIN offered ON offered.key = followed.key AND offered.place = listing.offered_seq "
        "JOIN continuation USING (parent, tokens) "
        "WHERE document_id = ? AND continuation.key = followed.key ORDER BY position",
        (listing.document_id,),
    )
    count = len(queries.matchable(listing, chunks, -inf))
    if [key for (key,) in held] != list(listing.chunk_keys[:count]):
        yield f"{listing.document_id}: what the database matches of it is something else"


def tree_problems(tree: PrefixTree) -> Iterator[str]:
    """Yield what is wrong within the tree, a line each; nothing may change it meanwhile."""
    count = 0
    stack = list(tree.roots.values())
    while stack:
        node = stack.pop()
        yield from _node_problems(node, tree.chunk_tokens)
        if node.children is not None:
            stack += node.children.nodes
            count += len(node.children.nodes)
    if count != tree.chunk_count:
        yield f"the tree has {count} chunks and counts {tree.chunk_count}"
    for name, entry in tree.entries.items():
        steps = pairwise(entry.path)
        if entry.place not in entry.path[-1].ended or any(
            parent.child(node.tokens) is not node for parent, node in steps
        ):
            yield f"{name}: its way through the tree is broken"


def _node_problems(node: Node, chunk_tokens: int) -> Iterator[str]:
    name = f"a chunk of {len(node.tokens) // TOKEN_BYTES} tokens in the tree"
    if node.children is None:
        if not node.ended:
            yield f"{name} belongs to no listing"
            return
    else:
        tokens = [child.tokens for child in node.children.nodes]
        if any(a >= b for a, b in pairwise(tokens)):
            yield f"{name} has children out of order"
        if list(node.children.firsts) != [child.first for child in node.children.nodes]:
            yield f"{name} does not know which of its children was offered first"
        if len(node.tokens) not in (0, chunk_tokens * TOKEN_BYTES):
            yield f"{name} is short, but others follow it"
    if node.first != node.earliest():
        yield f"{name} does not know its first listing"
