"""The pages as people see them: Chromium on a real server, from signing in to the receipt."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.support.browser import (
    DESK,
    PHONE,
    SCHEMES,
    chromium,
    count,
    findings,
    focused,
    keep_picture,
    nano,
    overflow_px,
    serious,
    visiting,
)
from tests.support.browser_story import OTHERS, TEXT, TITLE, buy, publish
from tests.support.engines import NANO
from tests.support.serving import serving
from vllm_kvmarket.ledger import PROVIDER

DOCUMENT_URL = re.compile(r"/kvmarket/documents/kvd_\w+$")


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(browser, tiny, tmp_path_factory):
    """After the browser: without one there is nothing to start a server for."""
    with serving(tiny(1), tmp_path_factory.mktemp("browser") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def keys(server):
    """Secrets by account: a publisher, two buyers, an admin."""
    made = {"boss": server.keys.create("boss", ["admin"])[0]}
    for name, kind in (("pat", "publisher"), ("bea", "buyer"), ("ben", "buyer"), ("cho", "buyer")):
        server.market.create_account(name, kind)
        server.market.deposit(name, 10 * NANO, f"first:{name}")
        made[name] = server.keys.create(name, [kind])[0]
    return made


@pytest.fixture(scope="module")
def offer(server, browser, keys):
    return publish(server, browser, keys["pat"])


@pytest.fixture(scope="module")
def sales(server, keys, offer):
    return buy(server, "bea", keys["bea"], offer.id)


def test_a_publisher_publishes_and_watches_it_go_live(server, offer):
    """Signed in, through the form; the page looks again by itself, and what is live is listed."""
    assert offer.states == ("publishing", "live")
    assert offer.loads >= 1
    listing = server.market.catalogue.get(offer.id)
    assert (listing.state, listing.terms.title, listing.terms.publisher) == ("live", TITLE, "pat")
    assert listing.terms.cache_read_nano_per_mtok == NANO // 20
    assert listing.terms.rendered_as == "chat"


def test_a_buyer_finds_balance_transfers_and_receipts_as_they_are(server, browser, keys, sales):
    """To the nano: what the page shows is what the ledger holds."""
    ledger = server.market.ledger
    with visiting(browser, server.base) as bea:
        bea.sign_in(keys["bea"])
        page = bea.page
        account = ledger.account("bea")
        assert nano(bea.tile("Balance")) == account.balance_nano < 10 * NANO
        assert account.balance_nano == 10 * NANO - sum(each.charge_nano for each in sales)
        rows = bea.rows("table#receipts")
        assert [(row["Document"], nano(row["Charged"]), count(row["Reused"])) for row in rows] == [
            (TITLE, each.charge_nano, each.tokens_reused) for each in sales
        ]
        assert all(each.charge_nano > 0 for each in sales)
        moved = {"post": -1, "plain": 1}  # of the buyer's: charges, and the deposit
        shown = [nano(row["Amount"]) for row in bea.rows("table#transfers")]
        assert shown == [
            each.amount_nano * moved.get(each.kind, 1) for each in ledger.transfers("bea")
        ]
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("link", name="Sign in")).to_be_visible()
        bea.open("/money")
        assert page.url.startswith(f"{server.base}/kvmarket/signin")
    with visiting(browser, server.base) as ben:
        ben.sign_in(keys["ben"])
        assert ben.page.locator("table#receipts").count() == 0
        assert nano(ben.tile("Balance")) == 10 * NANO
        for path in (
            "?account=bea",
            f"/receipt?id={sales[0].id}",
            f"/receipt.jws?id={sales[0].id}",
        ):
            assert ben.fetch(f"/kvmarket/money{path}").status == 404


def test_a_receipt_is_downloaded_and_verifies_offline(server, browser, keys, sales, tmp_path):
    """The page says that it holds; the two files from it say so to a machine without the market."""
    with visiting(browser, server.base, java_script_enabled=False) as bea:
        bea.sign_in(keys["bea"])
        page = bea.page
        page.locator("table#receipts a").first.click()
        expect(page.locator("#verified")).to_contain_text("signature is valid")
        assert nano(bea.tile("Charged")) == sales[0].charge_nano
        for link, name in (
            ("Download the receipt (JWS)", "receipt.jws"),
            ("Download the provider's public keys", "provider.jwks"),
        ):
            with page.expect_download() as downloading:
                page.get_by_role("link", name=link).click()
            downloading.value.save_as(tmp_path / name)
    jws = (tmp_path / "receipt.jws").read_text()

    def check(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "checked.jws").write_text(text)
        command = [sys.executable, "-m", "vllm_kvmarket.cli", "receipt", "verify", "checked.jws"]
        command += ["--jwks", "provider.jwks", "--home", str(tmp_path / "elsewhere")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    good = check(jws)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "good: signed by the market" in good.stdout
    head, body, signature = jws.strip().split(".")
    assert check(f"{head}.{body[:-8]}AAAAAAAA.{signature}").returncode != 0


def test_the_provider_s_view_is_the_ledger_s(server, browser, keys, offer, sales):
    """Hit rate, revenue, royalties, savings and top documents; for the admin alone."""
    provider = server.market.ledger.account(PROVIDER)
    # Uses are written together, every few seconds.
    deadline = time.monotonic() + 60
    while server.market.catalogue.usage_of(offer.id).uses < len(sales):
        assert time.monotonic() < deadline, "the engine has not noted its uses"
        time.sleep(0.2)
    with visiting(browser, server.base) as boss:
        boss.sign_in(keys["boss"])
        boss.page.get_by_role("link", name="Provider", exact=True).click()
        rate = float(boss.tile("Hit rate").rstrip("%"))
        assert 0 < rate < 100
        charged = sum(each.charge_nano for each in sales)
        royalties = sum(each.royalty_nano for each in sales)
        assert nano(boss.tile("Charged")) == charged > royalties > 0
        assert nano(boss.tile("Royalties")) == royalties
        assert nano(boss.tile("Balance")) == provider.balance_nano == charged - royalties
        assert nano(boss.tile("Buyers saved")) == sum(
            each.recompute_nano - each.charge_nano for each in sales
        )
        top = boss.rows("table#top")
        assert [(row["Document"], row["Reuses"]) for row in top] == [(TITLE, str(len(sales)))]
        tokens = sum(each.tokens_reused for each in sales)
        assert count(top[0]["Tokens saved"]) == tokens
        assert boss.tile("First token, median") != "-"
        for figure in ("revenue", "ttft"):
            expect(boss.page.locator(f"#figure-{figure} svg")).to_be_visible()
    with visiting(browser, server.base) as ben:
        ben.sign_in(keys["ben"])
        assert ben.page.get_by_role("link", name="Provider", exact=True).count() == 0
        assert ben.fetch("/kvmarket/provider").status == 403


def test_the_search_narrows_the_catalogue(server, browser, offer):
    """By a word of the title; nothing found is said, and what is typed stays text."""
    everything = len(server.market.catalogue.listings(state="live"))
    with visiting(browser, server.base) as anyone:
        anyone.open()
        assert len(anyone.rows("table#documents")) == everything == len(OTHERS) + 1

        def search(text: str) -> None:
            anyone.page.fill("form#search input[name=search]", text)
            with anyone.page.expect_navigation():
                anyone.page.press("form#search input[name=search]", "Enter")

        search(TITLE[-8:].upper())
        assert [row["Document"] for row in anyone.rows("table#documents")] == [TITLE]
        search("<b>nothing</b>")
        assert anyone.page.locator("table#documents").count() == 0
        expect(anyone.page.locator("main")).to_contain_text("<b>nothing</b>")
        assert anyone.page.locator("main b").count() == 0


def test_everything_reads_the_same_without_javascript(server, browser, keys, sales):
    """Word for word, the charts' tables included."""
    with_scripts, without = (
        {
            name: visitor.page.text_content("main")
            for name, visitor in walk(browser, server, keys, sales[0], java_script_enabled=enabled)
        }
        for enabled in (True, False)
    )
    assert without == with_scripts
    assert all(len(text.split()) > 15 for text in without.values())


def test_the_keyboard_is_enough(server, browser, offer):
    """Skip link, search, document: reached by Tab, with the place in sight, and used by Enter."""
    with visiting(browser, server.base) as anyone:
        page = anyone.page
        anyone.open()
        page.keyboard.press("Tab")
        assert focused(page) == "a Skip to the content"
        page.keyboard.press("Enter")
        assert urlsplit(page.url).fragment == "main"

        def tab_to(what: str) -> None:
            for _ in range(20):
                page.keyboard.press("Tab")
                assert page.evaluate(
                    "() => getComputedStyle(document.activeElement).outlineStyle !== 'none'"
                ), f"{focused(page)} has the focus, and nobody sees it"
                if focused(page) == what:
                    return
            pytest.fail(f"Tab does not lead to {what}")

        tab_to("input search")
        page.keyboard.type(TITLE[:6].lower())
        with page.expect_navigation():
            page.keyboard.press("Enter")
        tab_to(f"a {TITLE}")
        page.keyboard.press("Enter")
        page.wait_for_url(DOCUMENT_URL)
        expect(page.locator("h1")).to_have_text(TITLE)


def test_a_session_is_a_cookie_that_scripts_and_other_sites_do_not_get(server, browser, keys):
    """httpOnly and SameSite=Strict, on the pages alone; the key itself is in no page or cookie."""
    with visiting(browser, server.base) as bea:
        bea.sign_in(keys["bea"])
        (cookie,) = bea.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        assert cookie["path"] == "/kvmarket"
        assert bea.page.evaluate("() => document.cookie") == ""
        assert keys["bea"] not in bea.page.content() + cookie["value"]
        # Revoked, a key ends the sessions that it opened.
        secret, key_id = server.keys.create("bea", ["buyer"])
        bea.sign_in(secret)
        server.keys.revoke(key_id)
        time.sleep(1)
        bea.open("/money")
        assert "/signin" in bea.page.url


def test_a_form_without_its_token_or_from_elsewhere_is_refused(server, browser, keys, offer):
    """Nothing is published, changed or withdrawn: not with the cookie alone, nor with another
    session's token, nor by a form on another site, or on the same one at another port.
    """
    fields = {"title": "forged", "text": TEXT[: len(TEXT) // 2], "rendered_as": "text"}
    with visiting(browser, server.base) as pat, visiting(browser, server.base) as other:
        pat.sign_in(keys["pat"])
        other.sign_in(keys["pat"])
        token = other.page.get_attribute("form#signout [name=csrf]", "value")
        for path in ("/publish", f"/offers/{offer.id}/delist", f"/offers/{offer.id}/terms"):
            for form in (fields, fields | {"csrf": ""}, fields | {"csrf": token}):
                assert pat.fetch(f"/kvmarket{path}", method="POST", form=form).status == 403
        own = pat.page.get_attribute("form#signout [name=csrf]", "value")
        forged = (
            f"<form method=post action='{server.base}/kvmarket/offers/{offer.id}/delist'>"
            f"<input name=csrf value='{own}'><button>win</button></form>"
        )
        # From another site no cookie comes along; from another port it does, and is not enough.
        for origin, status in (("http://evil.test/", 401), ("http://127.0.0.1:9/", 403)):
            pat.context.route(
                origin, lambda route: route.fulfill(body=forged, content_type="text/html")
            )
            pat.page.goto(origin)
            pat.expect(status)
            with pat.page.expect_navigation() as going:
                pat.page.click("button")
            assert going.value.status == status
        pat.troubles = [each for each in pat.troubles if "asks http://" not in each]
        bad = pat.fetch("/kvmarket/signin", method="POST", form={"key": keys["bea"]})
        assert bad.status == 403
    assert server.market.catalogue.get(offer.id).state == "live"
    assert "forged" not in {each.terms.title for each in server.market.catalogue.listings()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_page_has_a_serious_finding_and_all_fit_a_phone(server, browser, keys, sales, scheme):
    """axe-core on every page; none scrolls sideways on 360 pixels. The pictures are kept."""
    found, wide, paper = [], [], set()
    for name, visitor in walk(browser, server, keys, sales[0], color_scheme=scheme):
        page = visitor.page
        page.evaluate("() => document.querySelectorAll('details').forEach(e => e.open = true)")
        paper.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        for place, size in (("", DESK), ("-phone", PHONE)):
            page.set_viewport_size(size)
            keep_picture(page, f"{name}-{scheme}{place}")
            wide += [name + place] if overflow_px(page) > 0 else []
        page.set_viewport_size(DESK)
        found += [f"{name}: {each}" for each in findings(page)]
    print("\n".join(found))
    assert [each for each in found if serious([each.partition(": ")[2]])] == []
    assert wide == []
    (colour,) = paper
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60


def test_the_watch_sees_what_it_is_there_for(browser):
    """A page with an image from elsewhere, a script that its CSP forbids, and no text for it."""
    body = "<html lang=en><title>a</title><main><h1>a</h1><img src=https://elsewhere.test/a>"
    with visiting(browser, "http://127.0.0.1:9") as anyone:
        anyone.context.route(
            "**/kvmarket",
            lambda route: route.fulfill(
                body=f"{body}<script>1</script></main>",
                content_type="text/html",
                headers={"Content-Security-Policy": "script-src 'none'"},
            ),
        )
        anyone.open()
        anyone.page.wait_for_timeout(500)
        seen = " ".join(anyone.troubles)
        assert "asks https://elsewhere.test/a" in seen
        assert "Content Security Policy" in seen
        assert [each.split()[1] for each in serious(findings(anyone.page))] == ["image-alt:"]
        anyone.troubles.clear()


def walk(browser, server, keys, receipt, **options):
    """Every page, opened in turn: its name, and who looks at it."""
    document = receipt.document_id
    pages = {
        None: {
            "catalogue": "",
            "search": "?search=nothing+of+this+name",
            "document": f"/documents/{document}",
            "signin": "/signin",
        },
        "pat": {"publish": "/publish", "offer": f"/offers/{document}", "royalties": "/money"},
        "bea": {"money": "/money", "receipt": f"/money/receipt?id={receipt.id}"},
        "boss": {"provider": "/provider", "accounts": "/money?account=bea"},
    }
    for who, paths in pages.items():
        with visiting(browser, server.base, **options) as visitor:
            if who:
                visitor.sign_in(keys[who])
            for name, path in paths.items():
                visitor.open(path)
                yield name, visitor


@pytest.mark.usefixtures("sales")
@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_code_that_a_documents_page_shows_works(server, browser, keys, offer, form):
    """Copied as it stands, with a key in it: the document is bought, and something is answered."""
    (other,) = (
        each.document_id
        for each in server.market.catalogue.listings()
        if each.terms.title == OTHERS[0]
    )
    document_id = offer.id if form == "chat" else other
    with visiting(browser, server.base) as anyone:
        anyone.open(f"/documents/{document_id}")
        code = anyone.page.get_by_role("group", name="Code in Python").inner_text()
    before = len(server.market.ledger.receipts(document_id=document_id))
    done = subprocess.run(
        [sys.executable, "-c", code.replace("kvm_...", keys["cho"])],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    server.spent("cho")
    receipts = server.market.ledger.receipts(document_id=document_id)
    assert len(receipts) == before + 1
    assert receipts[0].account == "cho" and receipts[0].tokens_reused > 0


# The letters' heights in pixels, and pairs of labels that cover each other, of every chart.
LETTERS = """() => [...document.querySelectorAll("figure svg")].map((svg) => {
  const boxes = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  const covers = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const pairs = boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => covers(a, b)));
  return [boxes.length, Math.max(...boxes.map((box) => box.height)), pairs.length];
})"""


@pytest.mark.usefixtures("sales")
def test_the_labels_of_charts_are_small_and_apart(server, browser, keys, offer):
    """On a wide window, where a chart once grew to the page's width, and its letters with it."""
    with visiting(browser, server.base) as boss:
        boss.sign_in(keys["boss"])
        for path in (f"/documents/{offer.id}", "/provider"):
            boss.open(path)
            charts = boss.page.evaluate(LETTERS)
            assert charts and all(labels > 3 for labels, _, _ in charts)
            assert [pairs for _, _, pairs in charts] == [0] * len(charts), path
            assert max(height for _, height, _ in charts) < 24, path
