"""A story that the pages show: a document published in the browser, and bought through the API."""

from __future__ import annotations

import time
from dataclasses import dataclass

from openai import OpenAI
from playwright.sync_api import Browser, expect

from tests.support.browser import visiting
from tests.support.engines import words
from tests.support.serving import MODEL, Server
from vllm_kvmarket.ledger import Receipt

TITLE = "Log of the cape"
TEXT = ("The guard writes down each ship that passes, her flag and the wind. " * 60).strip()
QUESTIONS = ("Which ships passed?", "What was the wind?", "Whose flag was the last?")
OTHERS = ("Tides and currents", "Notices to mariners")


@dataclass(frozen=True)
class Offer:
    """A document that was published in the browser, and what was seen of it meanwhile."""

    id: str
    states: tuple[str, ...]
    loads: int


def publish(server: Server, browser: Browser, key: str) -> Offer:
    """Through the form, behind two documents of others, so that there is time to look."""
    for number, title in enumerate(OTHERS):
        wish = {"token_ids": words(7801 + number, 3000), "title": title}
        assert server.post("/v1/kvmarket/documents", wish, key).status_code == 202
    with visiting(browser, server.base) as publisher:
        publisher.sign_in(key)
        page = publisher.page
        page.get_by_role("link", name="Publish", exact=True).click()
        page.fill("form#publish [name=title]", TITLE)
        page.fill("form#publish [name=text]", TEXT)
        page.select_option("form#publish [name=rendered_as]", "chat")
        page.fill("form#publish [name=price]", "0.05")
        page.click("form#publish [type=submit]")
        page.wait_for_url("**/kvmarket/offers/*")
        first, loads = page.inner_text("#state"), []
        page.on("framenavigated", lambda frame: loads.append(frame.url))
        # Nobody touches the page from here on.
        expect(page.locator("#state")).to_have_text("live", timeout=60_000)
        seen = Offer(page.url.rpartition("/")[2], (first, "live"), len(loads))
        page.get_by_role("link", name="See it in the catalogue").click()
        expect(page.locator("h1")).to_have_text(TITLE)
    return seen


def buy(server: Server, account: str, key: str, document_id: str) -> list[Receipt]:
    """With the openai package, twice whole and once as a stream; two more prompts begin with
    nobody's document. The sales, the newest first.
    """
    time.sleep(1)  # until the engine sells what it has published
    wanted = {"kvmarket": {"document": document_id, "reuse": "require"}}
    with OpenAI(base_url=f"{server.base}/v1", api_key=key, max_retries=0) as client:
        for number, question in enumerate(QUESTIONS):
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(
                model=MODEL,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=4,
                extra_body=wanted,
                # openai leaves a stream at [DONE], mostly before our event; usage tells too.
                **(
                    {"stream": True, "stream_options": {"include_usage": True}}
                    if not number
                    else {}
                ),
            )
            if number == 0:
                assert list(answer)
        client.completions.create(model=MODEL, prompt=words(7803, 400), max_tokens=1)
        unknown = client.completions.create(
            model=MODEL,
            prompt=words(7804, 900),
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert list(unknown)
    server.spent(account)
    sold = server.market.ledger.receipts(document_id=document_id)
    assert len(sold) == len(QUESTIONS)
    return sold
