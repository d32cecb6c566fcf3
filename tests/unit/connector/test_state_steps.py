"""Steps of the model that end where a recurrent state is stored."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kvmarket.connector.state_steps import end_steps_at_states, steps_end_at
from vllm_kvmarket.core.model_identity import marked


def scheduler_and_half(between, *, aligned=False):
    scheduler = object.__new__(Scheduler)
    scheduler.need_mamba_block_aligned_split = aligned
    half = SimpleNamespace(
        namespaces=SimpleNamespace(base=marked(b"n" * 32, between)),
        engine=SimpleNamespace(facts=SimpleNamespace(chunk_tokens=256)),
        copies_pages_of=lambda request: request.request_id == "publish",
    )
    return scheduler, half


def test_a_step_of_a_publication_ends_at_the_next_state_at_the_latest():
    """Other requests compute as much as they may."""
    scheduler, half = scheduler_and_half(2)
    end_steps_at_states(scheduler, half)
    assert scheduler.need_mamba_block_aligned_split
    publish = SimpleNamespace(request_id="publish", num_computed_tokens=500)
    assert scheduler._mamba_block_aligned_split(publish, 2048) == 12
    assert scheduler._mamba_block_aligned_split(publish, 7) == 7
    assert scheduler._mamba_block_aligned_split(publish, 2048, 0, 12) == 512
    buyer = SimpleNamespace(request_id="reuse", num_computed_tokens=500)
    assert scheduler._mamba_block_aligned_split(buyer, 2048) == 2048


def test_without_states_inside_documents_vllms_scheduler_stays_as_it_is():
    """Nor is it changed where it cuts for itself."""
    scheduler, half = scheduler_and_half(0)
    end_steps_at_states(scheduler, half)
    assert not scheduler.need_mamba_block_aligned_split
    scheduler, half = scheduler_and_half(2, aligned=True)
    with pytest.raises(RuntimeError, match="ends of blocks"):
        end_steps_at_states(scheduler, half)


@pytest.mark.parametrize("between", [0, 2])
def test_a_prefill_is_cut_in_two_for_a_while(between):
    """Before a token, and as vLLM likes behind it; afterwards all is as it was."""
    scheduler, half = scheduler_and_half(between)
    end_steps_at_states(scheduler, half)
    asked = SimpleNamespace(request_id="publish", num_computed_tokens=0)
    with steps_end_at(scheduler, 300):
        assert scheduler.need_mamba_block_aligned_split
        cut = scheduler._mamba_block_aligned_split
        assert [cut(asked, 2048), cut(asked, 299), cut(asked, 2048, 16, 200)] == [300, 299, 84]
        asked.num_computed_tokens = 300
        assert cut(asked, 2048) == 2048
    assert scheduler.need_mamba_block_aligned_split == bool(between)
    if between:
        assert scheduler._mamba_block_aligned_split(asked, 2048) == 212
