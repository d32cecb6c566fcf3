"""A document is published, preloaded, and bought by two agents, in one offline engine.

python examples/offline_preloaded_documents.py [MODEL] [DOCUMENT]
"""

import sys
from pathlib import Path

from vllm import SamplingParams

from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import open_llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else ".cache/models/SmolLM2-135M-Instruct"
TEXT = Path(sys.argv[2] if len(sys.argv) > 2 else "LICENSE").read_text()


def main():
    with Market.open() as market:
        llm = open_llm(MODEL, market, max_model_len=4096)
        listing = market.publish(llm, TEXT, title="Licence", publisher="apache")
        market.preload(llm, listing.document_id)
        for agent, question in (("ann", "Who may use this?"), ("ben", "Is there a warranty?")):
            market.create_account(agent)
            market.deposit(agent, 1_000_000_000, transfer_id=f"welcome:{agent}")
            params = SamplingParams(
                temperature=0, max_tokens=16, extra_args=market.params(account=agent)
            )
            (output,) = llm.generate([f"{TEXT}\n\nQ: {question}\nA:"], params, use_tqdm=False)
            sold = output.kv_transfer_params["kvmarket"]
            print(
                agent, output.outputs[0].text.strip()[:60], sold["reused_tokens"], "tokens reused"
            )
            print(market.receipt(sold["receipt_id"]))


if __name__ == "__main__":
    main()
