"""A Hypothesis state machine over the catalogue: a dictionary says what every storage must say.

Two machines work on each storage, interleaved: what one does, both must show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.catalogue_documents import NAMESPACE, chunks_of, listing_of
from vllm_kvmarket.catalogue import Catalogue, Listing, Use
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.core.errors import CatalogueRefusedError, NotFoundError

CHUNK = 4
PAST_S = 1.0
Tokens = tuple[int, ...]


@dataclass
class Document:
    """What the model knows of a document."""

    tokens: Tokens
    publisher: str = ""
    price: int | None = None
    state: str = "new"
    place: int | None = None
    is_listed: bool = False
    is_pinned: bool = False
    is_over: bool = False
    publishing: list[int] = field(default_factory=list)  # a life's number, once for each beginning
    first_offers: dict[str, int] = field(default_factory=dict)
    uses: int = 0
    used_tokens: int = 0

    @property
    def name(self) -> str:
        return listing_of(self.tokens, CHUNK).document_id

    @property
    def keys(self) -> tuple[bytes, ...]:
        return listing_of(self.tokens, CHUNK).chunk_keys


class Model:
    """The catalogue's rules over a dictionary."""

    def __init__(self) -> None:
        self.documents: dict[Tokens, Document] = {}
        self.damaged: set[bytes] = set()
        self.refuted: set[bytes] = set()
        self.alive = {0, 1}
        self.offers = 0

    def start(self, life: int, tokens: Tokens, publisher: str, price: int | None) -> Document:
        known = self.documents.setdefault(tokens, Document(tokens))
        known.publishing = [each for each in known.publishing if each in self.alive]
        others = any(each != life for each in known.publishing)
        if known.state != "live" and not (known.state == "publishing" and others):
            known.publisher, known.price, known.state = publisher, price, "publishing"
            if not known.is_listed:
                known.is_pinned = known.is_over = False
                known.place = known.first_offers.get(publisher)
        return known

    def begin(self, life: int, tokens: Tokens, publisher: str, price: int | None) -> str:
        known = self.start(life, tokens, publisher, price)
        if known.state == "publishing":
            known.publishing.append(life)
        return known.state

    def offer(self, known: Document) -> None:
        known.state = "damaged" if self.damaged & set(known.keys) else "live"
        known.is_listed = True
        if known.place is None:
            self.offers += 1
            known.place = self.offers
        if known.place not in known.first_offers.values():
            known.first_offers.setdefault(known.publisher, known.place)

    def commit(self, life: int, known: Document) -> bool:
        if known.state == "publishing" and life in known.publishing:
            known.publishing = []
            self.offer(known)
            return True
        return known.state == "live"

    def leave(self, known: Document, state: str) -> None:
        known.state, known.is_listed, known.is_pinned = state, False, False

    def fail_unless_published(self, known: Document) -> None:
        known.publishing = [each for each in known.publishing if each in self.alive]
        if known.state == "publishing" and not known.publishing:
            if known.is_listed:
                self.offer(known)
            else:
                self.leave(known, "failed")

    def with_chunk(self, key: bytes, states: tuple[str, ...]) -> list[Document]:
        return [
            each for each in self.documents.values() if key in each.keys and each.state in states
        ]

    def match(self, request: Tokens) -> list[tuple[int, str]]:
        on_offer = [
            each
            for each in self.documents.values()
            if each.state in ON_OFFER and not each.is_over and each.place is not None
        ]
        found: list[tuple[int, str]] = []
        for known in sorted(on_offer, key=lambda each: each.place or 0):
            count = 0
            for index, (a, b) in enumerate(zip(known.tokens, request, strict=False)):
                if a != b or known.keys[index // CHUNK] in self.damaged:
                    break
                count += 1
            if count > (found[-1][0] if found else 0):
                found.append((count, known.name))
        return found


class CatalogueMachine(RuleBasedStateMachine):
    """Subclasses say which storages there are, each with two machines."""

    documents = st.builds(
        lambda stem, rest: (7,) * stem + tuple(rest),
        st.sampled_from([1, 3, 4, 5, 8]),
        st.lists(st.integers(0, 1), max_size=3),
    )
    which = st.integers(0, 1000)
    machines = st.integers(0, 1)
    publishers = st.sampled_from(["acme", "other"])
    prices = st.sampled_from([None, 0, 70])

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.lives = [0, 1]
        self.step = 0
        self.places = self.open_places()
        self.storages = [[self.open(place), self.open(place)] for place in self.places]

    def open_places(self) -> list[Path | str]:
        raise NotImplementedError

    @staticmethod
    def open(place: Path | str) -> Catalogue:
        return Catalogue.open(place, CHUNK)

    def teardown(self) -> None:
        for storage in self.storages:
            for catalogue in storage:
                catalogue.close()

    def all(self, machine: int, act) -> set[object]:
        """Do the same on each storage, by one of its machines; what they answer."""
        return {act(storage[machine]) for storage in self.storages}

    def chosen(self, which: int) -> Document | None:
        known = list(self.model.documents.values())
        return known[which % len(known)] if known else None

    def listing(self, document: Tokens, publisher: str, price: int | None) -> Listing:
        return listing_of(
            document,
            CHUNK,
            publisher=publisher,
            cache_read_nano_per_mtok=price,
            created_at_s=float(self.step),
        )

    # Publishing

    @rule(machine=machines, document=documents, publisher=publishers, price=prices)
    def begin(self, machine, document, publisher, price) -> None:
        self.step += 1
        listing = self.listing(document, publisher, price)
        state = self.model.begin(self.lives[machine], document, publisher, price)
        chunks = chunks_of(document, CHUNK)
        assert self.all(machine, lambda each: each.begin(listing, chunks).state) == {state}

    @rule(machine=machines, document=documents, publisher=publishers, price=prices)
    def publish(self, machine, document, publisher, price) -> None:
        self.begin(machine, document, publisher, price)
        self.commit(machine, list(self.model.documents).index(document))

    @rule(
        machine=machines,
        document=documents,
        publisher=publishers,
        price=prices,
        force=st.booleans(),
    )
    def adopt(self, machine, document, publisher, price, force) -> None:
        self.step += 1
        listing = self.listing(document, publisher, price)
        known = self.model.documents.setdefault(document, Document(document))
        if known.state not in ON_OFFER and (known.state != "delisted" or force):
            self.model.start(self.lives[machine], document, publisher, price)
            known.publishing = []
            self.model.offer(known)
        chunks = chunks_of(document, CHUNK)
        assert self.all(machine, lambda each: each.adopt(listing, chunks, force=force).state) == {
            known.state
        }

    @rule(machine=machines, which=which)
    def commit(self, machine, which) -> None:
        if known := self.chosen(which):

            def commit(catalogue: Catalogue) -> str:
                try:
                    return catalogue.commit(known.name, 100 * len(known.tokens)).state
                except CatalogueRefusedError:
                    return "refused"

            is_done = self.model.commit(self.lives[machine], known)
            expected = known.state if is_done else "refused"
            assert self.all(machine, commit) == {expected}

    @rule(machine=machines, which=which)
    def fail(self, machine, which) -> None:
        if known := self.chosen(which):
            if known.state == "publishing":
                if self.lives[machine] in known.publishing:
                    known.publishing.remove(self.lives[machine])
                self.model.fail_unless_published(known)
            self.all(machine, lambda each: each.fail(known.name, "it failed"))

    @rule(machine=machines)
    def die(self, machine) -> None:
        """A machine ends and starts again, in the middle of whatever it was publishing."""
        self.model.alive.discard(self.lives[machine])
        self.lives[machine] = max(*self.lives, *self.model.alive, 1) + 1
        self.model.alive.add(self.lives[machine])
        for place, storage in zip(self.places, self.storages, strict=True):
            storage[machine].close()
            storage[machine] = self.open(place)

    @rule(machine=machines)
    def fail_abandoned(self, machine) -> None:
        for known in self.model.documents.values():
            if known.state == "publishing":
                self.model.fail_unless_published(known)
        self.all(machine, lambda each: len(each.fail_abandoned()))

    # Leaving

    @rule(machine=machines, which=which)
    def delist(self, machine, which) -> None:
        if known := self.chosen(which):

            def delist(catalogue: Catalogue) -> bool:
                try:
                    catalogue.delist(known.name)
                except NotFoundError:
                    return False
                return True

            expected = known.state != "delisted"
            if expected:
                self.model.leave(known, "delisted")
                known.publishing = []
            assert self.all(machine, delist) == {expected}

    @rule(machine=machines, which=which)
    def evict(self, machine, which) -> None:
        if known := self.chosen(which):
            expected = known.state in ON_OFFER and not known.is_pinned
            if expected:
                self.model.leave(known, "evicted")
            assert self.all(machine, lambda each: each.evict(known.name, "no room")) == {expected}

    @rule(machine=machines, which=which)
    def end(self, machine, which) -> None:
        """Its time is over; the database may not know it yet."""
        known = self.chosen(which)
        if known and known.state in NEEDED:
            known.is_over = True
            self.all(machine, lambda each: each.set_expiry(known.name, PAST_S).state)

    @rule(machine=machines)
    def expire(self, machine) -> None:
        ended = [e for e in self.model.documents.values() if e.state in ON_OFFER and e.is_over]
        for known in ended:
            self.model.leave(known, "expired")
        expected = tuple(sorted(known.name for known in ended))
        assert self.all(machine, lambda each: tuple(sorted(each.expire()))) == {expected}

    # Terms, damage and uses

    @rule(machine=machines, which=which, price=prices)
    def set_price(self, machine, which, price) -> None:
        known = self.chosen(which)
        if known and known.state in NEEDED:
            known.price = price
            self.all(machine, lambda each: each.set_price(known.name, price).state)

    @rule(machine=machines, which=which, pinned=st.booleans())
    def pin(self, machine, which, pinned) -> None:
        known = self.chosen(which)
        if known and known.state in NEEDED:
            known.is_pinned = pinned
            self.all(machine, lambda each: each.set_pinned(known.name, pinned).state)

    @rule(machine=machines, which=which)
    def damage(self, machine, which) -> None:
        if known := self.chosen(which):
            key = known.keys[which % len(known.keys)]
            if self.model.with_chunk(key, NEEDED) and key not in self.model.damaged:
                self.model.damaged.add(key)
                for each in self.model.with_chunk(key, ON_OFFER):
                    each.state = "damaged"
            self.all(machine, lambda each: each.report_damage(key))

    @rule(machine=machines, which=which)
    def refute(self, machine, which) -> None:
        """An audit finds wrong pages: no heal helps until they are deleted."""
        if known := self.chosen(which):
            key = known.keys[which % len(known.keys)]
            self.damage(machine, which)
            self.model.damaged.add(key)
            self.model.refuted.add(key)
            self.all(machine, lambda each: each.refute([key]))

    @rule(machine=machines)
    def replace(self, machine) -> None:
        """What was refuted is deleted, unless somebody is publishing it."""
        refuted = self.model.refuted
        free = {key for key in refuted if not self.model.with_chunk(key, ("publishing",))}
        keys = sorted(refuted)
        deleted = self.all(machine, lambda each: each.leftovers.release(keys, lambda _: None))
        assert deleted == {len(free)}
        refuted -= free

    @rule(machine=machines, which=which)
    def heal(self, machine, which) -> None:
        if self.model.damaged:
            key = sorted(self.model.damaged)[which % len(self.model.damaged)]
            if key not in self.model.refuted:
                self.model.damaged.discard(key)
            for each in self.model.with_chunk(key, ("damaged",)):
                self.model.offer(each)
            self.all(machine, lambda each: each.heal(key))

    @rule(machine=machines, which=which, share=st.floats(0.1, 1))
    def use(self, machine, which, share) -> None:
        if known := self.chosen(which):
            tokens = max(1, int(share * len(known.tokens)))
            known.uses += 1
            known.used_tokens += tokens
            use = Use(known.name, tokens, 5, 1000.0 + self.step)
            self.all(machine, lambda each: each.note_uses([use]))

    # What every machine of every storage must say

    @invariant()
    def all_answer_as_the_model(self) -> None:
        documents = list(self.model.documents.values())
        keys = {key for known in documents for key in known.keys}
        coming = {key for e in documents if e.state == "publishing" for key in e.keys}
        offered = {key for e in documents if e.state in ON_OFFER for key in e.keys}
        needed = coming | (offered - self.model.refuted)
        facts = sorted(
            (e.name, e.state, e.publisher, e.price, e.is_pinned, e.uses, e.used_tokens)
            for e in documents
        )
        requests = [(*known.tokens, 1) for known in documents]
        requests += [known.tokens[:cut] for known in documents[:2] for cut in range(1, 9)]
        on_offer = sorted(known.name for known in documents if known.state in ON_OFFER)
        candidates, listings = [], []
        for catalogue in (each for storage in self.storages for each in storage):
            catalogue.refresh()
            for request in requests:
                match = catalogue.match_anywhere(NAMESPACE, request)
                segments = match.segments if match else ()
                answer = [(each.end, each.listing.document_id) for each in segments]
                assert answer == self.model.match(request)
            assert catalogue.needed_chunks(keys) == needed
            assert facts_of(catalogue) == facts
            candidates.append(catalogue.candidates())
            assert [each.document_id for each in candidates[-1]] == on_offer
            listings.append(catalogue.listings())
            assert catalogue.check_integrity() == []
        # Every number that eviction uses, and all of each listing.
        assert all(each == candidates[0] for each in candidates)
        assert all(each == listings[0] for each in listings)


def facts_of(catalogue: Catalogue) -> list[tuple[object, ...]]:
    """What a catalogue says of each document, as the model has it."""
    found = []
    for listing in catalogue.listings():
        usage = catalogue.usage_of(listing.document_id)
        found.append((
            listing.document_id, listing.state, listing.terms.publisher,
            listing.terms.cache_read_nano_per_mtok, listing.pinned, usage.uses,
            usage.tokens_reused,
        ))  # fmt: skip
    return sorted(found)
