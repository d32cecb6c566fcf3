"""An error's class decides the answer's status, never a word in its message."""

from __future__ import annotations

import pytest

from vllm_kvmarket.api.errors import translate
from vllm_kvmarket.core import errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.NotFoundError("there is no document"), 404, "not_found"),
        (errors.LedgerRefusedError("no account 'database'"), 409, "refused_by_ledger"),
        (errors.CatalogueRefusedError("it is expired"), 409, "refused_by_catalogue"),
        (errors.RefusedError("no"), 409, "refused"),
        (errors.LedgerUnavailableError("the ledger is closed"), 503, "market_unavailable"),
        (errors.LedgerBusyError("100000 batches behind"), 503, "market_unavailable"),
        (errors.CatalogueUnavailableError("locked"), 503, "market_unavailable"),
        (errors.StoreFullError("/secret/path is full"), 503, "market_unavailable"),
        (errors.CatalogueError("other tokens under one key: a database"), 500, "internal_error"),
    ],
)
def test_the_class_of_an_error_decides_the_answer(error, status, code):
    """A refusal tells its reason; an outage and a broken invariant name nothing internal."""
    answer = translate(error)
    assert answer is not None and (answer.status, answer.code) == (status, code)
    assert (str(error) in answer.message) == (status < 500)


def test_a_refusal_with_another_error_behind_it_stays_a_refusal():
    """Only the class counts, also where an error of the database caused it."""
    error = errors.LedgerRefusedError("the amount is too large")
    error.__cause__ = ValueError("no database")
    answer = translate(error)
    assert answer is not None and answer.status == 409
