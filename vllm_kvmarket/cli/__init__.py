"""The command line, `kvmarket`: what a user does with a market without writing Python."""

from vllm_kvmarket.cli.app import commands, main

__all__ = ["commands", "main"]
