"""The costs of many reads of one document: prefilled, reused, or shipped.

Reuse compute is priced by time: prefill costs the tariff's `input` price, and reuse the same share
of it as its time is of prefill's. Shipping is the egress of the document's whole KV for each read.
Amounts are exact, and each is rounded down once, to a nano-unit.
Source: 'Can I Buy Your KV Cache?', arXiv 2606.13361; the defaults reproduce its abstract.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from vllm_kvmarket.core.pricing import MTOK, Tariff, Terms

PAPER_AGENTS = 80_000_000
PAPER_TOKENS = 3_774
PAPER_PREFILL_TO_REUSE = Fraction(497, 10)
# The paper's model, Qwen3-4B in 16 bits: 36 layers x 8 KV heads x 128 x (key + value) x 2 bytes.
PAPER_KV_BYTES_PER_TOKEN = 36 * 8 * 128 * 2 * 2
# A public cloud's usual list price for traffic to the internet, 0.09 units per GB.
EGRESS_NANO_PER_GB = 90_000_000
GB = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs and income of a number of reads of one document, in nano-units.

    `prefill` computes the document for every read, `reuse` is the compute of loading it instead,
    `shipping` the egress of sending its KV. `charge` is the buyers' price under the tariff,
    `royalty` the publisher's share of it.
    """

    reads: int
    prefill_nano: int
    reuse_nano: int
    shipping_nano: int
    charge_nano: int
    royalty_nano: int

    @property
    def margin_nano(self) -> int:
        """What is left to the provider; negative when reuse costs more than it brings."""
        return self.charge_nano - self.royalty_nano - self.reuse_nano

    @property
    def saved_nano(self) -> int:
        """The buyers' gain over paying for prefill."""
        return self.prefill_nano - self.charge_nano


@dataclass(frozen=True, slots=True, kw_only=True)
class Economics:
    """One document, the number of its readers, and the prices.

    `prefill_to_reuse` is the measured time of prefill divided by that of reuse. Raises ValueError
    for impossible figures.
    """

    agents: int = PAPER_AGENTS
    tokens: int = PAPER_TOKENS
    tariff: Tariff = field(default_factory=Tariff)
    prefill_to_reuse: Fraction = PAPER_PREFILL_TO_REUSE
    kv_bytes_per_token: int = PAPER_KV_BYTES_PER_TOKEN
    egress_nano_per_gb: int = EGRESS_NANO_PER_GB

    def __post_init__(self) -> None:
        for name in ("agents", "tokens", "prefill_to_reuse"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("kv_bytes_per_token", "egress_nano_per_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @property
    def terms(self) -> Terms:
        """The unit prices of a reservation under the tariff."""
        return self.tariff.terms()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the document's KV."""
        return self.tokens * self.kv_bytes_per_token

    @property
    def break_even_reads(self) -> int | None:
        """The first number of reads at which publish-and-reuse costs less than prefill each time.

        None when reuse takes as long as prefill, so that publishing never pays back.
        """
        if self.prefill_to_reuse <= 1:
            return None
        # N * prefill > prefill + N * reuse, with reuse = prefill / ratio.
        return int(self.prefill_to_reuse / (self.prefill_to_reuse - 1)) + 1

    @property
    def per_read(self) -> Costs:
        """The costs of one read."""
        return self.costs(1)

    @property
    def total(self) -> Costs:
        """The costs of all agents' reads."""
        return self.costs(self.agents)

    def costs(self, reads: int) -> Costs:
        """The costs of `reads` reads; a charge and its royalty are rounded for each read."""
        prefill = Fraction(reads * self.tokens * self.tariff.input_nano_per_mtok, MTOK)
        charge = self.terms.charge_nano(self.tokens)
        return Costs(
            reads=reads,
            prefill_nano=int(prefill),
            reuse_nano=int(prefill / self.prefill_to_reuse),
            shipping_nano=reads * self.kv_bytes * self.egress_nano_per_gb // GB,
            charge_nano=reads * charge,
            royalty_nano=reads * self.terms.royalty_nano(charge),
        )
