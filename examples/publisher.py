"""A publisher puts a text on offer, waits until it is, and reads what it has earned.

python examples/publisher.py FILE [--title TITLE] [--as chat]

The server and the key come from --url and --key, or from KVMARKET_URL and KVMARKET_KEY.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import httpx


def main():
    parser = argparse.ArgumentParser(description="Publish a text, and see its royalties.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--title")
    parser.add_argument("--as", dest="as_", choices=("text", "chat"), default="text")
    parser.add_argument("--url", default=os.environ.get("KVMARKET_URL", "http://localhost:8000"))
    parser.add_argument("--key", default=os.environ.get("KVMARKET_KEY"), help="kvm_...")
    args = parser.parse_args()
    headers = {"authorization": f"Bearer {args.key}"}
    with httpx.Client(base_url=f"{args.url}/v1/kvmarket", headers=headers, timeout=60) as market:
        # The end of a file's last line would stand between the text and what buyers write.
        wish = {"text": args.file.read_text().rstrip(), "as": args.as_}
        wish["title"] = args.title or args.file.name
        posted = market.post("/documents", json=wish)
        if posted.is_error:
            sys.exit(posted.json()["error"]["message"])
        document = posted.json()
        while document["state"] == "publishing":
            time.sleep(0.2)
            document = market.get(f"/documents/{document['id']}").raise_for_status().json()
        if document["state"] != "live":
            sys.exit(f"{document['state']}: {document['reason']}")
        print(f"document {document['id']} is live: {document['tokens']} tokens")
        statement = market.get("/accounts/me/statement").raise_for_status().json()
    royalties = [line for line in statement["lines"] if line["kind"] == "royalty"]
    own = [line for line in royalties if line["document_id"] == document["id"]]
    earned = sum(line["amount_nano"] for line in own)
    print(f"sold {len(own)} times, earned {earned / 1e9:.9f}")


if __name__ == "__main__":
    main()
