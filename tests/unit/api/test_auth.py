"""The bucket that a request is counted in, and how many may wait."""

from __future__ import annotations

import pytest

from vllm_kvmarket.api.auth import Limiter, Queue, Rate, counted_as, key_in, sender_address
from vllm_kvmarket.api.errors import ApiError


def address(client, forwarded=(), proxies=()):
    headers = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    return counted_as(sender_address({"client": (client, 1), "headers": headers}, proxies))


@pytest.mark.parametrize(
    ("client", "forwarded", "proxies", "expected"),
    [
        ("192.0.2.1", (), (), "192.0.2.1"),
        ("192.0.2.1", ("198.51.100.7",), (), "192.0.2.1"),
        ("192.0.2.1", ("198.51.100.7",), ("10.0.0.0/8",), "192.0.2.1"),
        ("10.0.0.1", ("198.51.100.7",), ("10.0.0.0/8",), "198.51.100.7"),
        ("10.0.0.1", ("1.1.1.1, 198.51.100.7",), ("10.0.0.0/8",), "198.51.100.7"),
        ("10.0.0.1", ("198.51.100.7", "10.0.0.2"), ("10.0.0.0/8",), "198.51.100.7"),
        ("10.0.0.1", ("nonsense",), ("10.0.0.0/8",), "10.0.0.1"),
        ("10.0.0.1", (), ("10.0.0.0/8",), "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", (), (), "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", (), (), "192.0.2.1"),
        ("testclient", ("198.51.100.7",), ("10.0.0.0/8",), "testclient"),
    ],
)
def test_a_request_is_counted_by_its_senders_address(client, forwarded, proxies, expected):
    """A header is believed of trusted proxies only; an IPv6 network of 64 bits is one sender."""
    assert address(client, forwarded, proxies) == expected


def test_to_look_takes_nothing():
    """Only a wrong key is counted, and a right one is not."""
    limiter = Limiter(Rate(burst=1, per_s=0.01), clock=lambda: 0.0)
    for _ in range(3):
        limiter.count("a", take=False)
    assert limiter.wait_s("a") == 0
    with pytest.raises(ApiError) as refused:
        limiter.count("a", take=False)
    assert refused.value.status == 429


def test_a_queue_is_bounded():
    """One request too many is refused at once; a place is free again when its holder is done."""
    queue = Queue(2, "the tokenizer")
    with queue.place():
        with queue.place(), pytest.raises(ApiError) as refused, queue.place():
            pass
        assert refused.value.status == 503 and refused.value.headers["retry-after"]
        with queue.place():
            pass


@pytest.mark.parametrize("value", ["{}", "Bearer {}", "bearer  {} ", "BEARER {}"])
@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
def test_a_key_is_found_in_either_header(name, value):
    """With or without the word, in any case of it."""
    headers = [(name, value.format("kvm_secret").encode())]
    assert key_in({"headers": headers}) == "kvm_secret"


@pytest.mark.parametrize("value", ["", "Bearer", "Basic kvm_x", "Bearer sk-other", "sk-kvm_x"])
def test_what_is_no_key_of_ours_is_not_found(value):
    """It may be a key of vLLM's."""
    assert key_in({"headers": [(b"authorization", value.encode())]}) is None
