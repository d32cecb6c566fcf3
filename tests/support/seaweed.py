"""A SeaweedFS server of the tests' own: master, volume, filer and S3 gateway in one process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 60.0
_PORTS = ("master", "volume", "filer", "s3")
WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses just now."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


class SeaweedFS:
    """One server, its data in `folder`; it can be killed, stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = free_ports(2 * len(_PORTS))
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "kvmarket",
            "credentials": [{"accessKey": "key", "secretKey": "secret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        self._config = folder / "s3.json"
        self._config.write_text(json.dumps({"identities": [identity]}))

    @property
    def port(self) -> int:
        """Where its S3 gateway listens on 127.0.0.1."""
        return self._ports[2 * _PORTS.index("s3")]

    def options(self, port: int | None = None, **more: str) -> dict[str, str]:
        """Options of an object tier, by way of another port if one is given."""
        return {
            "endpoint": f"http://127.0.0.1:{port or self.port}",
            "region": "us-east-1",
            "allow_http": "true",
            **more,
        }

    def start(self) -> None:
        """Start it and wait until it answers; this process and its children may use it."""
        assert WEED is not None
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        arguments = [WEED, "server", f"-dir={self.folder / 'data'}", "-filer", "-s3"]
        arguments += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        # Alone: with others to wait for, it takes a quarter of a minute to start after a crash.
        arguments += ["-master.peers=none", "-master.volumeSizeLimitMB=64", "-volume.max=50"]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
        arguments += [f"-s3.config={self._config}"]
        for index, part in enumerate(_PORTS):
            arguments.append(f"-{part}.port={self._ports[2 * index]}")
            arguments.append(f"-{part}.port.grpc={self._ports[2 * index + 1]}")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder
            )
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < until_s, "weed does not answer"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        # Refused without credentials: it answers, and has read its identities.
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{self.port}/", timeout=1
            ).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 403
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it, and remove the sockets that it leaves in /tmp."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
