"""Models that vLLM does not run, or not exactly, on this machine: the KV cache that it would build
for them is taken. Whether a reuse is exact with it, an engine's self-test says.
"""

from __future__ import annotations

import ast
import re

import pytest

from benchmarks.model_family import FAMILIES
from benchmarks.models import reason, run_step

BY_NAME = {family.name: family for family in FAMILIES}
GDN = "1 x recurrent state (GDN_ATTN), blocks of 4096"
EXPECTED = {
    # Of each layer the latent, and the keys of its indexer.
    "deepseek-v32": ["6 x latent attention, blocks of 128"],
    "nemotron-h": [
        "1 x recurrent state (MAMBA2), blocks of 4096",
        "1 x full attention, blocks of 128",
    ],
    "qwen3-next": [GDN, GDN, GDN, "1 x full attention, blocks of 256"],
    "lfm2": [
        "2 x recurrent state (SHORT_CONV), blocks of 4096",
        "2 x full attention, blocks of 128",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_groups_that_vllm_builds_are_taken(name, tmp_path):
    """vLLM makes the model without memory, and the groups of its layers as in an engine."""
    log = run_step("specifications", BY_NAME[name], tmp_path, quick=True)
    assert not log, reason(log)
    (found,) = re.findall(r"GROUPS (.+)", (tmp_path / "specifications.log").read_text())
    assert ast.literal_eval(found) == EXPECTED[name]
