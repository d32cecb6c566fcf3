"""`python -m vllm_kvmarket.cli` is `kvmarket`."""

import sys

from vllm_kvmarket.cli import main

if __name__ == "__main__":
    sys.exit(main())
