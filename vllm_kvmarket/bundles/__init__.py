"""Signed bundles: one document as one file, carried from one market's home to another's.

Importing believes nothing before the signature holds, and stores nothing before every byte of the
file is known to be what was signed. What a trusted exporter signed is believed to be the KV of
these tokens, as nothing but computing it again (`kvmarket document audit`) can tell.
"""

from vllm_kvmarket.bundles.export_import import Exported, export, import_, trusted_keys

__all__ = ["Exported", "export", "import_", "trusted_keys"]
