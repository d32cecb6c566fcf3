"""What is left of an API key's budgets."""

from vllm_kvmarket.auth.api_keys import Keys


def budget_left_nano(keys: Keys, key_id: str) -> int | None:
    """The most that the key may still spend today; None without a budget."""
    (found,) = keys.listed(key_id=key_id)
    budgets = (
        (found.limits.day_budget_nano, found.spent_today_nano),
        (found.limits.total_budget_nano, found.spent_nano),
    )
    return min((most - spent for most, spent in budgets if most is not None), default=None)
