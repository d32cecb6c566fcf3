"""Everything that kvmarket raises on purpose.

    KVMarketError
    ├── ConfigError              a configuration key or value is wrong
    ├── VersionError             this vLLM version is not supported
    ├── NotFoundError            no such document, account or receipt
    ├── NotPublishableError      this document cannot be published
    ├── PublishFailedError       publishing started and did not end well
    ├── PinError                 the engine cannot hold this document in its paged cache
    ├── AuditFailedError         stored chunks could not be compared with computed ones
    ├── BundleError              a bundle that is damaged, tampered with or not trusted
    ├── ProofError               a receipt, checkpoint or proof that does not hold
    ├── RefusedError             a rule said no: the caller can change something
    ├── UnavailableError         a database or an engine is away: try again
    ├── CatalogueError           the catalogue's invariants do not hold
    │   ├── CatalogueRefusedError      (is a RefusedError too)
    │   └── CatalogueUnavailableError  (is an UnavailableError too)
    ├── LedgerError              the ledger's invariants do not hold
    │   ├── LedgerRefusedError         (is a RefusedError too)
    │   │   ├── KeyConflictError       an Idempotency-Key came with another body
    │   │   └── KeyUsedUpError         an Idempotency-Key covers no more answers
    │   └── LedgerUnavailableError     (is an UnavailableError too)
    │       ├── LedgerBusyError        too many batches wait already
    │       └── LedgerPostponedError   it is in the outbox, and booked later
    └── StoreError               the store is away or cannot do this
        ├── ChunkMissingError    no file for this chunk
        ├── ChunkDamagedError    a file that is not bit-exactly what was stored
        ├── LayoutMismatchError  stored in a layout that this engine cannot use
        └── StoreFullError       no space left on the device or in the quota

Messages are one line: what is wrong, then what to do about it. What a server answers follows from
the class of an error, never from its message.
"""

from __future__ import annotations


class KVMarketError(Exception):
    """The root of every error that kvmarket raises on purpose."""


class ConfigError(KVMarketError):
    """A configuration key or value is wrong; the message names it."""


class VersionError(KVMarketError):
    """The installed vLLM is not one that this plugin supports."""


class NotFoundError(KVMarketError):
    """No such document, account or receipt."""


class NotPublishableError(KVMarketError):
    """This document cannot be published: empty, too short, too long, not text."""


class PublishFailedError(KVMarketError):
    """Publishing started and did not end with a listing; nothing was listed."""


class PinError(KVMarketError):
    """The engine cannot hold this document in its paged cache; nothing was pinned."""


class AuditFailedError(KVMarketError):
    """Stored chunks could not be compared with computed ones; nothing was recorded."""


class BundleError(KVMarketError):
    """A bundle that is damaged, was tampered with, or is not signed by a trusted key."""


class ProofError(KVMarketError):
    """A receipt, checkpoint or proof is malformed, not signed by a known key, or does not hold."""


class RefusedError(KVMarketError):
    """A rule said no; the same request is refused until its caller changes something."""


class UnavailableError(KVMarketError):
    """A database or an engine is away; the same request may succeed later."""


class CatalogueError(KVMarketError):
    """The catalogue's invariants do not hold."""


class CatalogueRefusedError(CatalogueError, RefusedError):
    """A rule of the catalogue said no, for example for a document that is not on offer."""


class CatalogueUnavailableError(CatalogueError, UnavailableError):
    """The catalogue's database cannot be used."""


class LedgerError(KVMarketError):
    """The ledger's invariants do not hold."""


class LedgerRefusedError(LedgerError, RefusedError):
    """A rule of the ledger said no, for example for an account without enough funds."""


class KeyConflictError(LedgerRefusedError):
    """A client's Idempotency-Key was used before, with another body."""


class KeyUsedUpError(LedgerRefusedError):
    """A client's Idempotency-Key has covered as many answers as one key can."""


class LedgerUnavailableError(LedgerError, UnavailableError):
    """The ledger's database cannot be used. Whether a write took effect may be unknown.

    The same batch may be submitted again: its ids show what took effect before.
    """


class LedgerPostponedError(LedgerUnavailableError):
    """The ledger is closed or away; the batch is in the home's outbox, and will be booked."""


class LedgerBusyError(LedgerUnavailableError):
    """Too many batches wait to be written; this one has no effect."""


class StoreError(KVMarketError):
    """The store could not do what it was asked."""


class ChunkMissingError(StoreError):
    """There is no file for this chunk."""


class ChunkDamagedError(StoreError):
    """A chunk's file is not bit-exactly what was stored under its key."""


class LayoutMismatchError(StoreError):
    """A chunk is stored in a layout that this engine cannot use."""


class StoreFullError(StoreError):
    """No space is left on the device or in the store's quota."""
