"""An agent reads a document that it does not have, several times, and checks what it paid.

python examples/buying_agent.py DOCUMENT QUESTION [QUESTION ...]

The server and the key come from --url and --key, or from KVMARKET_URL and KVMARKET_KEY.
"""

import argparse
import os

import httpx
from openai import OpenAI

from vllm_kvmarket.auth.signing_keys import PublicKey
from vllm_kvmarket.proofs import verify


def main():
    parser = argparse.ArgumentParser(description="Ask a published document questions.")
    parser.add_argument("document", help="its id, kvd_...")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", default=os.environ.get("KVMARKET_URL", "http://localhost:8000"))
    parser.add_argument("--key", default=os.environ.get("KVMARKET_KEY"), help="kvm_...")
    args = parser.parse_args()
    openai = OpenAI(base_url=f"{args.url}/v1", api_key=args.key)
    headers = {"authorization": f"Bearer {args.key}"}
    with httpx.Client(base_url=f"{args.url}/v1/kvmarket", headers=headers) as market:
        document = get(market, f"/documents/{args.document}")
        print(f"{document['title']}: {document['tokens']} tokens of {document['publisher']}'s")
        names = [ask(openai, document, question) for question in args.questions]
        receipts = [get(market, f"/receipts/{name}") for name in names]
        keys = [PublicKey.of_jwk(each) for each in get(market, "/jwks")["keys"]]
        available = get(market, "/accounts/me")["available_nano"]
    # From here on nothing is asked of the server: these are kept, and checked by anyone who doubts.
    for receipt in receipts:
        signed = verify(receipt["signed"]["signature"], keys).payload.kvmarket.receipt
        assert (signed.id, signed.charge_nano) == (receipt["id"], receipt["charge_nano"])
    paid = sum(receipt["charge_nano"] for receipt in receipts)
    computing = sum(receipt["recompute_nano"] for receipt in receipts)
    print(f"paid {amount(paid)}, saved {amount(computing - paid)}, left {amount(available)}")
    print(f"receipts verified offline: {len(receipts)}")


def ask(openai, document, question):
    """Ask one question about the document; the answer's id."""
    wish = {
        "model": openai.models.list().data[0].id,
        "max_tokens": 32,
        "temperature": 0,
        "extra_body": {"kvmarket": {"document": document["id"], "reuse": "require"}},
    }
    if document["rendered_as"] == "chat":
        messages = [{"role": "user", "content": question}]
        answer = openai.chat.completions.create(messages=messages, **wish)
        text = answer.choices[0].message.content
    else:
        answer = openai.completions.create(prompt=f"\n\nQ: {question}\nA:", **wish)
        text = answer.choices[0].text
    sold = answer.kv_transfer_params["kvmarket"]
    print(f"- {question} {' '.join(text.split())[:60]}")
    print(f"  {sold['reused_tokens']} tokens reused, {sold['computed_tokens']} computed")
    return answer.id


def get(market, path):
    """What a route of the market answers."""
    return market.get(path).raise_for_status().json()


def amount(nano):
    """Nano-units as money."""
    return f"{nano / 1e9:.9f}"


if __name__ == "__main__":
    main()
