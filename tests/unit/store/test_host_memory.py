"""The host-memory tier: bounded, and never pulled from under its readers."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.store_chunks import layout_of
from vllm_kvmarket.store import host_memory
from vllm_kvmarket.store.host_memory import HostTier, layers_of


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def fill(tier: HostTier, number: int, size: int = 100, *, prefetched: bool = False) -> bool:
    """Bring a chunk of bytes that tell its number; whether it found room."""
    filling = tier.begin(key_of(number), prefetched=prefetched)
    assert filling is not None
    with filling:
        room = filling.memory(size)
        if room is None:
            return False
        room[:] = number
        filling.commit()
    return True


def holds(tier: HostTier, number: int) -> bool:
    held = tier.pin(key_of(number))
    if held is None:
        return False
    with held as pages:
        assert (pages == number).all()
    return True


def test_a_buffer_holds_layer_after_layer():
    """Views of the buffer, in the layout's order, of the size of each layer's pages."""
    layout = layout_of(8, layers=3)
    buffer = np.arange(3 * 2 * 8, dtype=np.uint8)
    layers = layers_of(buffer, layout, 2)
    assert [list(layer[[0, -1]]) for layer in layers] == [[0, 15], [16, 31], [32, 47]]
    assert all(np.shares_memory(layer, buffer) for layer in layers)


def test_what_was_kept_can_be_held():
    """Bytes come back as they were filled in, as often as they are asked for."""
    tier = HostTier(1000)
    assert not holds(tier, 1)
    assert fill(tier, 1)
    assert holds(tier, 1)
    assert holds(tier, 1)
    assert tier.usage() == host_memory.HostUsage(100, 1000, 1)


def test_the_least_recently_used_chunk_goes_first():
    """Holding a chunk is a use of it."""
    tier = HostTier(300)
    for number in (1, 2, 3):
        assert fill(tier, number)
    assert holds(tier, 1)
    assert fill(tier, 4)
    assert [holds(tier, number) for number in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_chunk_that_is_held_is_not_given_up():
    """Where everything is held there is no room, and nothing changes."""
    tier = HostTier(200)
    assert fill(tier, 1)
    assert fill(tier, 2)
    with tier.pin(key_of(1)) as first, tier.pin(key_of(2)):
        assert not fill(tier, 3)
        assert (first == 1).all()
    assert holds(tier, 1)
    assert holds(tier, 2)
    assert fill(tier, 3)
    assert not holds(tier, 1)


def test_eviction_does_all_or_nothing():
    """A chunk that would not fit even then pushes nobody out."""
    tier = HostTier(300)
    for number in (1, 2, 3):
        assert fill(tier, number)
    with tier.pin(key_of(2)):
        assert not fill(tier, 4, 250)
    assert not fill(tier, 5, 301)
    assert [holds(tier, number) for number in (1, 2, 3)] == [True] * 3
    assert fill(tier, 4, 250)
    tier.check_integrity()


def test_memory_is_counted_before_it_is_allocated_and_used_again():
    """The limit holds while `allocate` runs, and a chunk of the same size takes over the memory."""
    made: list[int] = []

    def allocate(size: int) -> np.ndarray:
        made.append(size)
        assert tier.usage().bytes_used <= 300
        return np.empty(size, np.uint8)

    tier = HostTier(300, allocate)
    for number in range(1, 11):
        assert fill(tier, number)
    assert made == [100, 100, 100]
    assert fill(tier, 11, 150)
    tier.check_integrity()
    assert made == [100, 100, 100, 150]


def test_an_allocation_that_fails_is_no_room():
    """Out of memory is not an error of the load, and costs nothing of the capacity."""

    def allocate(size: int) -> np.ndarray:
        raise MemoryError

    tier = HostTier(300, allocate)
    assert not fill(tier, 1)
    assert tier.usage().bytes_used == 0


def test_a_filling_that_fails_leaves_nothing():
    """A chunk that was not kept is absent, its room is free, and another load may bring it."""
    tier = HostTier(100)

    def fail() -> None:
        with tier.begin(key_of(1)) as filling:
            filling.memory(100)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert not holds(tier, 1)
    assert fill(tier, 1)
    tier.check_integrity()


def test_only_one_brings_a_chunk():
    """`begin` answers None while it is on its way and when it is there."""
    tier = HostTier(300)
    with tier.begin(key_of(1)) as filling:
        assert tier.has(key_of(1))
        assert tier.begin(key_of(1)) is None
        filling.memory(100)[:] = 1
        filling.commit()
        assert holds(tier, 1)
    assert tier.begin(key_of(1)) is None


@pytest.mark.parametrize("kept", [True, False])
def test_a_load_waits_for_a_chunk_that_is_on_its_way(kept):
    """It then holds the pages, or hears that they did not come."""
    tier = HostTier(300)
    begun, may_end = threading.Event(), threading.Event()

    def bring() -> None:
        with tier.begin(key_of(1)) as filling:
            filling.memory(100)[:] = 1
            begun.set()
            may_end.wait(10)
            if kept:
                filling.commit()

    thread = threading.Thread(target=bring)
    thread.start()
    begun.wait(10)
    assert tier.pin(key_of(1)) is None
    threading.Timer(0.05, may_end.set).start()
    held = tier.pin(key_of(1), wait_s=10)
    assert (held is not None) == kept
    if held is not None:
        with held as pages:
            assert (pages == 1).all()
    thread.join()
    tier.check_integrity()


def test_a_dropped_chunk_stays_with_who_holds_it():
    """Its memory counts until it is given back, and is used again then."""
    tier = HostTier(100)
    assert fill(tier, 1)
    with tier.pin(key_of(1)) as pages:
        tier.drop(key_of(1))
        assert not holds(tier, 1)
        assert not fill(tier, 2)
        assert (pages == 1).all()
    assert fill(tier, 2)
    tier.drop(key_of(2))
    tier.drop(key_of(2))
    tier.check_integrity()
    assert fill(tier, 3)


def test_the_second_load_is_hot_and_the_memory_of_it_is_short():
    """A chunk that was loaded once before, not too long ago, deserves host memory."""
    tier = HostTier(100)
    assert not tier.is_hot(key_of(1))
    assert tier.is_hot(key_of(1))
    for number in range(2, host_memory.REMEMBERED_KEYS + 2):
        tier.is_hot(key_of(number))
    assert not tier.is_hot(key_of(1))


def test_a_prefetch_does_not_push_out_what_was_prefetched_for_another_request(monkeypatch):
    """Until it has been loaded once, or its request seems to have gone; loads may push it out."""
    tier = HostTier(200)
    assert fill(tier, 1, prefetched=True)
    assert fill(tier, 2, prefetched=True)
    assert not fill(tier, 3, prefetched=True)
    assert holds(tier, 1)
    assert fill(tier, 3, prefetched=True)
    assert not holds(tier, 1)
    assert fill(tier, 4)
    assert not holds(tier, 2)
    later = time.monotonic() + host_memory.PREFETCH_PROTECTED_S + 1
    monkeypatch.setattr(host_memory.time, "monotonic", lambda: later)
    assert fill(tier, 5, prefetched=True)


def test_a_tier_without_room_is_off():
    """Nothing is held, brought or remembered."""
    tier = HostTier(0)
    assert not tier.is_on
    assert tier.begin(key_of(1)) is None
    assert tier.pin(key_of(1)) is None
    assert not tier.is_hot(key_of(1))
    assert not tier.is_hot(key_of(1))


def test_threads_that_load_fill_and_drop_at_once_see_whole_chunks():
    """Eight threads, sixteen chunks of three sizes, room for a third of them."""
    tier = HostTier(1000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(400):
                number = rng.randrange(1, 17)
                if rng.random() < 0.05:
                    tier.drop(key_of(number))
                elif not holds(tier, number):
                    filling = tier.begin(key_of(number), prefetched=rng.random() < 0.3)
                    if filling is None:
                        continue
                    with filling:
                        room = filling.memory((100, 170, 256)[number % 3])
                        if room is not None and rng.random() < 0.9:
                            room[:] = number
                            filling.commit()
                assert tier.usage().bytes_used <= 1000
        except Exception as error:  # noqa: BLE001  # reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    tier.check_integrity()


class HostTierMachine(RuleBasedStateMachine):
    """Chunks come, are held and go in any order; a naive model knows who must still be there."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(500)
        self.dropped: set[int] = set()  # ids of buffers
        self.held: list[tuple[int, object, np.ndarray]] = []

    @rule(number=st.integers(1, 9), size=st.sampled_from([60, 100, 240]))
    def bring(self, number: int, size: int) -> None:
        filling = self.tier.begin(key_of(number))
        if filling is None:
            assert self.tier.has(key_of(number))
            return
        before = self.tier.usage()
        in_use = sum({id(pages): pages.nbytes for *_, pages in self.held}.values())
        with filling:
            room = filling.memory(size)
            assert (room is not None) == (in_use + size <= 500)
            if room is None:
                assert self.tier.usage() == before
                return
            room[:] = number
            filling.commit()

    @rule(number=st.integers(1, 9))
    def hold(self, number: int) -> None:
        held = self.tier.pin(key_of(number))
        if held is not None:
            self.held.append((number, held, held.__enter__()))
            return
        ours = [pages for other, _, pages in self.held if other == number]
        assert all(id(pages) in self.dropped for pages in ours)

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False))
    def release(self, choice: random.Random) -> None:
        _, held, pages = self.held.pop(choice.randrange(len(self.held)))
        held.__exit__(None, None, None)
        if all(pages is not other for *_, other in self.held):
            self.dropped.discard(id(pages))

    @rule(number=st.integers(1, 9))
    def drop(self, number: int) -> None:
        self.tier.drop(key_of(number))
        self.dropped.update(id(pages) for other, _, pages in self.held if other == number)

    @invariant()
    def a_reader_of_a_chunk_sees_it_whole(self) -> None:
        for number, _, pages in self.held:
            assert (pages == number).all()

    @invariant()
    def the_counts_add_up(self) -> None:
        self.tier.check_integrity()


TestHostTierMachine = HostTierMachine.TestCase
TestHostTierMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
