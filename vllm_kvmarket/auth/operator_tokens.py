"""Bearer tokens for what a request asks of the market, signed with the market home's secret.

Whoever can read the home is its operator. An HTTP client cannot, so it can neither name somebody
else's account nor publish, whatever it writes into its body.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from pathlib import Path

from vllm_kvmarket.core.durable_files import write_durably
from vllm_kvmarket.core.errors import ConfigError

SECRET_FILE = "operator.key"  # noqa: S105  # its name, not the secret
SECRET_BYTES = 32
OPERATOR = "operator"
# An account's name, whole; wherever one is read.
ACCOUNT_PATTERN = r"[A-Za-z0-9._:@-]{1,128}"


def account_subject(account: str) -> str:
    """What a token for buying on an account is signed over."""
    return f"account:{account}"


class Credentials:
    """Makes and checks tokens under one home's secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of_home(cls, home: Path) -> Credentials:
        """Read the home's secret, or make it (mode 0600) where there is none.

        Raises ConfigError when the file is not a secret of ours.
        """
        path = home / SECRET_FILE
        home.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # A secret that another process makes meanwhile stays.
            with contextlib.suppress(FileExistsError):
                write_durably(path, secrets.token_bytes(SECRET_BYTES), replace=False)
        secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise ConfigError(
                f"{path} does not hold {SECRET_BYTES} bytes; restore it from a backup, "
                "or remove it to have a new one made (tokens given out so far then end)"
            )
        return cls(secret)

    def token(self, subject: str) -> str:
        """The token for `subject` (OPERATOR, or account_subject(id))."""
        return hmac.new(self._secret, subject.encode(), hashlib.sha256).hexdigest()

    def allows(self, subject: str, token: str) -> bool:
        """Whether `token` was made for `subject`, in constant time."""
        return hmac.compare_digest(self.token(subject).encode(), token.encode())
