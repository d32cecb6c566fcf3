"""Skip or fail a test whose program is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_without(what: str) -> NoReturn:
    """Skip, with what to do about it; in CI nothing may be missing, and the test fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI={os.environ['CI']}: {what}", pytrace=False)
    pytest.skip(what)
