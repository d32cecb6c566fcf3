"""/v1/kvmarket/documents and /quotes, on a real market."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.support.api_server import CONTEXT, as_, publish, running, settled, text_of
from vllm_kvmarket.auth.api_keys import KeyLimits
from vllm_kvmarket.catalogue import Use

DOCUMENTS = "/v1/kvmarket/documents"


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """Shared by tests in which nothing is done."""
    with running(tmp_path_factory.mktemp("home"), max_body_bytes=1 << 20) as opened:
        yield opened


def ids(server, who=None, **query):
    headers = as_(server, who) if who else {}
    got = server.client.get(DOCUMENTS, params=query, headers=headers)
    assert got.status_code == 200, got.text
    return [each["id"] for each in got.json()["data"]]


def test_publishing_answers_with_an_id_before_the_work_is_done(server):
    """202 and where to look; then live, with the terms that were asked for."""
    wish = {"text": text_of(300), "title": "x", "cache_read_nano_per_mtok": 7, "ttl_s": 60}
    posted = server.client.post(DOCUMENTS, json=wish, headers=as_(server, "pat"))
    assert posted.status_code == 202
    name = posted.json()["id"]
    assert posted.headers["location"] == f"{DOCUMENTS}/{name}"
    document = settled(server, name)
    assert (document["state"], document["tokens"], document["publisher"]) == ("live", 300, "pat")
    assert document["prices"]["cache_read_nano_per_mtok"] == 7
    assert document["expires_at"] == pytest.approx(document["created_at"] + 60)
    assert server.market.catalogue.get(name).state == "live"


def test_a_document_that_is_live_comes_back_as_it_is(server):
    """Also to another publisher, who does not become its publisher by asking."""
    first = publish(server, text=text_of(300), title="first")
    again = server.client.post(
        DOCUMENTS, json={"text": text_of(300), "title": "mine"}, headers=as_(server, "eve")
    )
    assert again.status_code == 200
    assert again.json() == first
    assert len(server.engine.wishes) == 1


def test_the_same_document_posted_by_many_at_once_is_published_once(server):
    """Whoever came first is its publisher; the others get the same id."""
    answers = []

    def post(who):
        wish = {"text": text_of(600), "title": who}
        answers.append(server.client.post(DOCUMENTS, json=wish, headers=as_(server, who)).json())

    threads = [threading.Thread(target=post, args=(who,)) for who in ("pat", "eve") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = {answer["id"] for answer in answers}
    (first,) = {answer["title"] for answer in answers}
    # Until it is live, nobody but its publisher sees it.
    assert settled(server, name, first)["state"] == "live"
    assert len(server.engine.wishes) == 1


def test_what_the_engine_declines_fails_with_its_reason(server):
    """The publisher sees it, nobody else does; and it may be tried again."""
    server.engine.declines = "the disk is full"
    failed = publish(server, text=text_of(300))
    assert (failed["state"], failed["reason"]) == ("failed", "the disk is full")
    assert ids(server) == []
    assert ids(server, "pat", state="failed") == [failed["id"]]
    assert ids(server, "eve", state="failed") == []
    assert server.client.get(f"{DOCUMENTS}/{failed['id']}").status_code == 404
    server.engine.declines = ""
    assert publish(server, text=text_of(300))["state"] == "live"


def test_an_engine_that_dies_fails_the_document_without_telling_its_inside(server):
    """The next one is published all the same."""
    server.engine.dies = True
    failed = publish(server, text=text_of(300))
    assert failed["state"] == "failed" and "dead" not in failed["reason"]
    server.engine.dies = False
    assert publish(server, text=text_of(301))["state"] == "live"


def test_what_waits_when_the_server_stops_fails_with_that_reason(tmp_path):
    """Nothing is left behind as being published."""
    with running(tmp_path) as server:

        async def never_done(tokens, wish):
            await asyncio.Event().wait()

        server.engine.operate = never_done
        for words in (300, 301):
            server.client.post(DOCUMENTS, json={"text": text_of(words)}, headers=as_(server, "pat"))
    with running(tmp_path) as server:
        states = [(each.state, each.reason) for each in server.market.catalogue.listings()]
        assert states == [("failed", "the server was stopped; publish it again")] * 2


@pytest.mark.parametrize(
    ("wish", "status", "param"),
    [
        ({}, 400, None),
        ({"text": "a", "token_ids": [1]}, 400, None),
        ({"text": ""}, 400, None),
        ({"text": 3}, 400, "text"),
        ({"text": text_of(3)}, 400, None),
        ({"text": text_of(CONTEXT)}, 413, None),
        ({"text": "w" * 40 * CONTEXT}, 413, "text"),
        ({"text": text_of(99), "title": "t" * 513}, 400, "title"),
        ({"text": text_of(99), "title": "a\nb"}, 400, "title"),
        ({"text": text_of(99), "ttl_s": 0}, 400, "ttl_s"),
        ({"text": text_of(99), "ttl_s": 1e30}, 400, "ttl_s"),
        ({"text": text_of(99), "royalty_ppm": 1_000_001}, 400, "royalty_ppm"),
        ({"text": text_of(99), "royalty_ppm": 500_001}, 400, "royalty_ppm"),
        (
            {"text": text_of(99), "cache_read_nano_per_mtok": 5_000_000_001},
            400,
            "cache_read_nano_per_mtok",
        ),
        ({"text": text_of(99), "cache_read_nano_per_mtok": 1 << 64}, 400, None),
        ({"text": text_of(99), "price": 1}, 400, "price"),
        ({"token_ids": [-1] * 99}, 400, "token_ids.0"),
        ({"token_ids": [True] * 99}, 400, "token_ids.0"),
        ({"token_ids": [4_294_967_295] * 99}, 400, "token_ids"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": text_of(99)}], "as": "text"}, 400, None),
        ({"text": text_of(99), "publisher": "eve"}, 403, None),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_with_its_field(refusing, wish, status, param):
    """In OpenAI's error shape, in one short line, and nothing is noted anywhere."""
    refused = refusing.client.post(DOCUMENTS, json=wish, headers=as_(refusing, "pat"))
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    assert len(error["message"]) < 300
    assert refusing.market.catalogue.listings() == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"", "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b"text=a", "application/x-www-form-urlencoded", 415),
        (b'{"text": "' + b"a" * (2 << 20) + b'"}', "application/json", 413),
    ],
)
def test_a_body_that_is_not_json_or_too_long_is_refused(refusing, body, kind, status):
    """With any bytes; the limit also holds without a stated length."""
    headers = {**as_(refusing, "pat"), "content-type": kind}
    for content in (body, iter([body])):
        refused = refusing.client.post(DOCUMENTS, content=content, headers=headers)
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["message"]


def test_lists_are_sorted_and_paged_without_loss_while_documents_come_and_go(server):
    """By age, reuse and price; each cursor goes on where it was, in its own order only."""
    names = [
        publish(server, text=text_of(300 + n), title=f"t{n}", cache_read_nano_per_mtok=100 - n)[
            "id"
        ]
        for n in range(5)
    ]
    for name, uses in zip(names, (3, 0, 5, 1, 0), strict=True):
        server.market.catalogue.note_uses([Use(name, 10, 1, time.time())] * uses)
    assert ids(server) == names[::-1]
    assert ids(server, sort="price") == names[::-1]
    assert ids(server, sort="reuse")[:3] == [names[2], names[0], names[3]]
    assert ids(server, search="T3") == [names[3]]
    assert ids(server, publisher="eve") == []
    first = server.client.get(DOCUMENTS, params={"limit": 2}).json()
    assert first["has_more"]
    publish(server, text=text_of(400))
    server.market.delist(names[3])
    rest = server.client.get(DOCUMENTS, params={"after": first["next_cursor"]}).json()
    assert [each["id"] for each in rest["data"]] == [names[2], names[1], names[0]]
    assert not rest["has_more"] and rest["next_cursor"] is None
    for query in (
        {"after": first["next_cursor"], "sort": "price"},
        {"after": "nonsense"},
        {"after": "e30"},
        {"limit": 0},
        {"limit": 101},
        {"sort": "name"},
        {"state": "lost"},
    ):
        assert server.client.get(DOCUMENTS, params=query).status_code == 400, query


def test_only_its_publisher_changes_or_withdraws_a_document(server):
    """A buyer lacks the scope, another publisher the document; an admin may do both."""
    name = publish(server, text=text_of(300))["id"]
    place = f"{DOCUMENTS}/{name}"
    for who, status in ((None, 401), ("bea", 403), ("eve", 403)):
        headers = as_(server, who) if who else {}
        assert server.client.patch(place, json={"ttl_s": 9}, headers=headers).status_code == status
        assert server.client.delete(place, headers=headers).status_code == status
    changed = server.client.patch(place, json={"ttl_s": 9}, headers=as_(server, "admin"))
    assert changed.json()["expires_at"] is not None
    changed = server.client.patch(place, json={"ttl_s": None}, headers=as_(server, "pat"))
    assert changed.json()["expires_at"] is None
    for wish in ({}, {"title": "x"}, {"ttl_s": -1}, {"ttl_s": "9"}):
        refused = server.client.patch(place, json=wish, headers=as_(server, "pat"))
        assert refused.status_code == 400, wish
    gone = server.client.delete(place, headers=as_(server, "pat"))
    assert gone.json() == {"id": name, "object": "kvmarket.document.deleted", "deleted": True}
    assert server.client.get(place).status_code == 404
    assert server.client.get(place, headers=as_(server, "pat")).json()["state"] == "delisted"
    assert server.client.delete(place, headers=as_(server, "pat")).status_code == 404
    assert (
        server.client.patch(place, json={"ttl_s": 9}, headers=as_(server, "pat")).status_code == 409
    )


def test_an_admins_changes_of_documents_are_recorded(server):
    """Publishing for others, new terms and withdrawals; not a publisher's own."""
    wish = {"text": text_of(300), "title": "x", "publisher": "pat"}
    posted = server.client.post(DOCUMENTS, json=wish, headers=as_(server, "admin"))
    name = posted.json()["id"]
    settled(server, name)
    place = f"{DOCUMENTS}/{name}"
    for who in ("admin", "pat"):
        server.client.patch(place, json={"ttl_s": 9}, headers=as_(server, who))
    server.client.delete(place, headers=as_(server, "admin"))
    entries = server.service.admin_log.entries(10)
    assert [(entry.action, entry.details["document_id"]) for entry in entries] == [
        ("document delist", name),
        ("document change", name),
        ("document publish", name),
    ]
    assert entries[1].details["ttl_s"] == 9
    assert entries[2].details["publisher"] == "pat"


def test_a_price_can_be_changed_and_returned_to_the_tariff(server):
    """The next quote has it."""
    name = publish(server, text=text_of(300))["id"]
    for price, expected in ((20, 20), (0, 0), (None, 500_000_000)):
        wish = {"cache_read_nano_per_mtok": price}
        changed = server.client.patch(f"{DOCUMENTS}/{name}", json=wish, headers=as_(server, "pat"))
        assert changed.json()["prices"]["cache_read_nano_per_mtok"] == expected
        time.sleep(0.1)
        quote = server.client.post("/v1/kvmarket/quotes", json={"document": name}).json()
        assert quote["charge_nano"] == 300 * expected // 1_000_000
    dear = server.client.patch(
        f"{DOCUMENTS}/{name}",
        json={"cache_read_nano_per_mtok": 5_000_000_001},
        headers=as_(server, "pat"),
    )
    assert dear.status_code == 400


def test_nothing_is_promised_of_an_engine_that_reuses_nothing(server):
    """Its self-test has failed, or runs still. Documents for other models are sold elsewhere."""
    name = publish(server, text=text_of(300))["id"]
    frontend = server.service.frontend
    frontend.is_exact = False

    def quote(**wish):
        return server.client.post("/v1/kvmarket/quotes", json=wish).json()

    for wish in ({"document": name}, {"prompt": text_of(300) + " and more"}):
        reply = quote(**wish)
        assert (reply["matched_tokens"], reply["charge_nano"], reply["lines"]) == (0, 0, [])
        assert "self-test" in reply["declined"]
    namespace, frontend.namespace = frontend.namespace, b"other"
    try:
        assert (quote(document=name)["matched_tokens"], quote(document=name)["declined"]) == (
            300,
            None,
        )
    finally:
        frontend.namespace, frontend.is_exact = namespace, True
    assert quote(document=name)["matched_tokens"] == 300


def test_an_expired_document_is_on_no_list_and_quoted_no_more(server):
    """From the moment its time is over, whatever the database says yet."""
    name = publish(server, text=text_of(300), ttl_s=0.3)["id"]
    time.sleep(0.4)
    assert ids(server) == []
    assert server.client.post("/v1/kvmarket/quotes", json={"document": name}).status_code == 404
    shown = server.client.get(f"{DOCUMENTS}/{name}", headers=as_(server, "pat")).json()
    assert shown["state"] == "expired"


def test_a_damaged_document_is_repaired_by_its_publisher_only(server):
    """Another one could else become its publisher, by publishing it again."""
    name = publish(server, text=text_of(300))["id"]
    server.market.catalogue.report_damage(server.market.catalogue.get(name).chunk_keys[0])
    wish = {"text": text_of(300)}
    refused = server.client.post(DOCUMENTS, json=wish, headers=as_(server, "eve"))
    assert refused.status_code == 409
    assert publish(server, **wish)["state"] == "live"


def test_a_quote_says_what_reuse_saves_to_the_nano_unit(server):
    """Of a prompt, of a document, of a prompt that is the document, of one that matches nothing."""
    name = publish(server, text=text_of(300), title="x")["id"]
    server.market.deposit("bea", 150_000, "d")

    def quote(**wish):
        asked = server.client.post("/v1/kvmarket/quotes", json=wish, headers=as_(server, "bea"))
        assert asked.status_code == 200, asked.text
        return asked.json()

    reply = quote(prompt=text_of(300) + " and more")
    assert (reply["prompt_tokens"], reply["matched_tokens"], reply["document"]) == (302, 300, name)
    assert (reply["charge_nano"], reply["with_reuse_nano"]) == (150_000, 160_000)
    assert (reply["without_reuse_nano"], reply["saving_nano"]) == (1_510_000, 1_350_000)
    assert reply["affordable"] is True
    assert quote(prompt=text_of(300))["matched_tokens"] == 299
    assert quote(document=name)["matched_tokens"] == 300
    assert quote(document=name)["declined"] is None
    other = quote(prompt=text_of(300, "other"))
    assert (other["matched_tokens"], other["document"], other["saving_nano"]) == (0, None, 0)
    server.market.ledger.transact()
    for wish in ({}, {"prompt": "a", "document": name}, {"document": "../x"}, {"token_ids": []}):
        refused = server.client.post("/v1/kvmarket/quotes", json=wish)
        assert refused.status_code == 400, wish
    long = server.client.post("/v1/kvmarket/quotes", json={"prompt": "w" * 40 * CONTEXT})
    assert long.status_code == 413


def test_a_document_costs_what_its_quote_says(server):
    """Also a longer edition, of which another listing owns the beginning."""
    first = publish(server, text=text_of(600), cache_read_nano_per_mtok=100_000_000)
    longer = publish(
        server,
        "eve",
        text=f"{text_of(600)} {text_of(200, 'x')}",
        cache_read_nano_per_mtok=200_000_000,
    )
    shown = server.client.get(f"{DOCUMENTS}/{longer['id']}").json()
    quoted = server.client.post("/v1/kvmarket/quotes", json={"document": longer["id"]}).json()
    assert shown["charge_nano"] == quoted["charge_nano"] == 600 * 100 + 200 * 200
    assert [line["document"] for line in quoted["lines"]] == [first["id"], longer["id"]]


def test_a_stranger_cannot_guess_a_text_by_quotes(server):
    """Token by token: a right guess changes nothing before 64 of them are right."""
    publish(server, text=text_of(300))
    seen = []
    for known in (128, 129, 191, 192):
        reply = server.client.post(
            "/v1/kvmarket/quotes", json={"prompt": f"{text_of(known)} and more"}
        ).json()
        seen.append((reply["matched_tokens"], reply["charge_nano"]))
    assert seen == [(128, 64_000)] * 3 + [(192, 96_000)]
    reply = server.client.post("/v1/kvmarket/quotes", json={"prompt": f"{text_of(63)} x"}).json()
    assert (reply["matched_tokens"], reply["document"]) == (0, None)


def test_a_quote_ends_where_the_callers_key_may_not_buy(server):
    """The engine sells it no more; a document that is too dear at its end is not affordable."""
    publish(server, text=text_of(300), cache_read_nano_per_mtok=100_000_000)
    whole = f"{text_of(300)} {text_of(300, 'x')}"
    server.market.deposit("bea", 10**9, "for quotes")
    dear = publish(server, "eve", text=whole, cache_read_nano_per_mtok=200_000_000)
    secret, _ = server.service.keys.create(
        "bea", limits=KeyLimits(max_cache_read_nano_per_mtok=100_000_000)
    )
    for headers, matched, affordable in (
        ({"x-api-key": secret}, 300, False),
        (as_(server, "bea"), 600, True),
    ):
        wish = {"token_ids": [*server.engine.document(whole, None, "text"), 1]}
        quoted = server.client.post("/v1/kvmarket/quotes", json=wish, headers=headers).json()
        assert (quoted["matched_tokens"], quoted["affordable"]) == (matched, True)
        wish = {"document": dear["id"]}
        quoted = server.client.post("/v1/kvmarket/quotes", json=wish, headers=headers).json()
        assert (quoted["matched_tokens"], quoted["affordable"]) == (600, affordable)


def test_a_server_without_an_engine_shows_but_does_not_publish(tmp_path):
    """503 where there is nothing to publish with, 404 where there is no market at all."""
    with running(tmp_path, engine=False) as server:
        assert ids(server) == []
        posted = server.client.post(DOCUMENTS, json={"text": "a"}, headers=as_(server, "pat"))
        assert posted.status_code == 503
        service, server.app.state.kvmarket_service = server.service, None
        missing = server.client.get("/v1/kvmarket")
        assert missing.status_code == 404
        assert "--kv-connector" in missing.json()["error"]["message"]
        server.app.state.kvmarket_service = service


def test_one_publisher_cannot_fill_the_queue(tmp_path):
    """429 for the third document that waits; another publisher's is accepted."""
    with running(tmp_path, publisher_max_queued=2) as server:
        server.engine.operate = lambda *_: asyncio.sleep(3600)

        def post(number, who):
            wish = {"text": text_of(300, f"{who}{number}-")}
            return server.client.post(DOCUMENTS, json=wish, headers=as_(server, who))

        # The first one is with the engine; the others wait.
        assert [post(number, "pat").status_code for number in range(3)] == [202, 202, 202]
        refused = post(3, "pat")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_queued")
        assert "retry-after" in refused.headers
        assert post(4, "eve").status_code == 202


def test_a_publisher_over_its_limit_is_refused_in_words(tmp_path):
    """409: nothing waits, and the reason names what to do."""
    with running(tmp_path, publisher_max_documents=1) as server:
        publish(server, text=text_of(300))
        wish = {"text": text_of(300, "other")}
        refused = server.client.post(DOCUMENTS, json=wish, headers=as_(server, "pat"))
        assert refused.status_code == 409
        assert "withdraw one first" in refused.json()["error"]["message"]


# Preloading


def preload(server, name, who="admin"):
    return server.client.post(f"{DOCUMENTS}/{name}/preload", headers=as_(server, who))


def test_an_admin_preloads_a_document_into_the_engine(server):
    """The engine gets the document's tokens and a signed wish; the admin's log has it."""
    name = publish(server, text=text_of(300))["id"]
    settled(server, name)
    answer = preload(server, name)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["reused_tokens"], answer.json()["loaded_tokens"]) == (299, 299)
    wish = server.service.frontend.wishes[-1]
    assert wish["preload"] is True
    assert server.market.credentials.allows_params(wish)
    assert server.service.admin_log.entries(1)[0].action == "document preload"


def test_what_cannot_be_preloaded_says_why(server):
    """Nobody but an admin; nothing that is not on offer; no engine, or one that died."""
    name = publish(server, text=text_of(300))["id"]
    settled(server, name)
    assert preload(server, name, "pat").status_code == 403
    assert preload(server, "kvd_0").status_code == 404
    frontend = server.service.frontend
    namespace, frontend.namespace = frontend.namespace, b"other"
    assert preload(server, name).json()["error"]["code"] == "other_model"
    frontend.namespace, frontend.dies = namespace, True
    assert preload(server, name).status_code == 503
    frontend.dies = False
    server.market.delist(name)
    assert preload(server, name).status_code == 404
