"""A real Chromium, what tests do with it, and what they hold against a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.support import ROOT
from tests.support.missing import skip_without

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Names lead nowhere, so that a page which asks another host cannot be helped by it.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# Artefacts, a picture a page: git does not know the folder, and the next run writes them anew.
SCREENSHOTS = ROOT / ".cache" / "screenshots"
DESK = {"width": 1200, "height": 800}
PHONE = {"width": 360, "height": 740}
SCHEMES = ("light", "dark")
# Impacts that no page may have a finding of.
SERIOUS = ("serious", "critical")
PATIENCE_MS = 30_000


def program() -> str:
    """Chromium's path; $CHROMIUM comes first. Without one the test is skipped, in CI it fails."""
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        skip_without(
            "no Chromium on this machine: apt-get install chromium, or name it by CHROMIUM"
        )
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; gone afterwards."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=program(), headless=True, chromium_sandbox=False, args=[*FLAGS]
        )
        try:
            yield opened
        finally:
            opened.close()


@dataclass
class Visitor:
    """One person's browser: a context with its cookies, a page, and all that went wrong on it."""

    base: str
    context: BrowserContext
    page: Page
    troubles: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def open(self, path: str = "") -> None:
        """Go to a page of the market; it must be there."""
        answer = self.page.goto(f"{self.base}/kvmarket{path}")
        assert answer is not None and answer.ok, f"{path}: {answer and answer.status}"

    def sign_in(self, key: str) -> None:
        """Through the form, as people do."""
        self.open("/signin")
        self.page.fill("form#signin input[name=key]", key)
        self.page.click("form#signin [type=submit]")
        self.page.wait_for_url(f"{self.base}/kvmarket/money")

    def fetch(self, path: str, **options: Any) -> Any:
        """A request with this browser's cookies, not from a page."""
        return self.context.request.fetch(f"{self.base}{path}", max_redirects=0, **options)

    def tile(self, name: str) -> str:
        """The figure under this name, without what is said of it in small print."""
        figure = self.page.locator(f"dl.tiles .tile:has(dt:text-is('{name}')) dd")
        return figure.evaluate("figure => figure.firstChild.textContent").strip()

    def rows(self, table: str) -> list[dict[str, str]]:
        """A table's rows as people read them, by the names of its columns."""
        head = self.page.locator(f"{table} thead th").all_inner_texts()
        return [
            dict(zip(head, row.locator("th, td").all_inner_texts(), strict=True))
            for row in self.page.locator(f"{table} tbody tr").all()
        ]

    def expect(self, status: int) -> None:
        """The next error of this kind on the console is what the test asks for."""
        self.expected.append(f"status of {status} ")

    def hear(self, message: ConsoleMessage) -> None:
        """Keep an error or a warning of the console: a violated CSP is one."""
        if message.type not in ("error", "warning"):
            return
        for each in self.expected:
            if each in message.text:
                self.expected.remove(each)
                return
        self.troubles.append(f"{message.type} on {self.page.url}: {message.text}")

    def see(self, url: str) -> None:
        """Keep a request to anybody but the market's own server."""
        if urlsplit(url).netloc != urlsplit(self.base).netloc:
            self.troubles.append(f"{self.page.url} asks {url}")


@contextmanager
def visiting(browser: Browser, base: str, **options: Any) -> Iterator[Visitor]:
    """Somebody new; at the end nothing may have gone wrong on any page they saw.

    `options` are Playwright's of a context: color_scheme, viewport, java_script_enabled.
    """
    context = browser.new_context(**{"viewport": DESK, **options})
    context.set_default_timeout(PATIENCE_MS)
    try:
        visitor = Visitor(base, context, context.new_page())
        visitor.page.on("console", visitor.hear)
        visitor.page.on("pageerror", lambda error: visitor.troubles.append(str(error)))
        visitor.page.on("request", lambda request: visitor.see(request.url))
        yield visitor
        visitor.page.wait_for_timeout(50)  # for what the last page still has to say
        assert visitor.troubles == []
    finally:
        context.close()


def nano(text: str) -> int:
    """An amount of a page in nano-units; it is there to the last of them."""
    sign = -1 if text.startswith("\N{MINUS SIGN}") else 1
    amount = Decimal(text.lstrip("+\N{MINUS SIGN}").replace(",", "")) * 1_000_000_000
    assert amount == int(amount)
    return sign * int(amount)


def count(text: str) -> int:
    """A whole number of a page."""
    return int(text.replace(",", ""))


def findings(page: Page) -> list[str]:
    """The violations that axe-core finds on a page as it stands: impact, rule, where."""
    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False}).response
    return [
        f"{each['impact']} {each['id']}: {node['target']} {node['html'][:120]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


def serious(found: Sequence[str]) -> list[str]:
    """Those that nobody may be asked to live with."""
    return [each for each in found if each.startswith(SERIOUS)]


def keep_picture(page: Page, name: str) -> Path:
    """The whole page as a picture among the artefacts; where."""
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def overflow_px(page: Page) -> int:
    """By how much a page is wider than its window."""
    return page.evaluate(
        "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def focused(page: Page) -> str:
    """Where the keyboard is: the element's tag, and its text, name or title."""
    return page.evaluate(
        "() => { const at = document.activeElement, name = at.getAttribute('name');"
        " return at.tagName.toLowerCase() + ' ' + (name || at.innerText || ''); }"
    ).strip()
