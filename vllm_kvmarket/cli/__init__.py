"""The command line, `kvmarket`: a market without writing Python."""

from vllm_kvmarket.cli.app import commands, main

__all__ = ["commands", "main"]
