"""The systems that are compared: each one's connector, packages, servers and where it stores.

Every configuration is the system's default wherever it has one; what differs is said in `note`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Connector = Callable[[Path], dict[str, Any] | None]
GIB = 1 << 30
PORT = 26550  # LMCache's server, loopback


@dataclass(frozen=True)
class Server:
    """A process that a system needs beside the engine; it serves once `port` answers, if it has one
    on loopback, and `wait_s` later.
    """

    command: tuple[str, ...]
    port: int | None = None
    wait_s: float = 2.0


@dataclass(frozen=True)
class System:
    """One row. `packages` go into a folder of their own, which only this system's processes see."""

    name: str
    label: str
    connector: Connector
    note: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    debian: tuple[str, ...] = ()
    servers: Callable[[Path, Path], tuple[Server, ...]] = lambda _folder, _packages: ()
    files: bool = True  # stored in files below FOLDER/stored, which can be damaged there
    survives_engine: bool = True  # what is stored outlives the engine
    isolated: bool = False  # in a network namespace that has loopback only
    probe: bool = False  # expected to fail on this backend: only tried
    kvmarket: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)


def transfer(name: str, **extra: Any) -> dict[str, Any]:
    """A kv_transfer_config; a load that the connector reports as failed is to be recomputed."""
    return {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def offloading(folder: Path) -> dict[str, Any]:
    """Host memory in front of files, copied by memcpy."""
    return transfer(
        "OffloadingConnector",
        spec_name="MemcpyTieringSpec",
        spec_module_path="benchmarks.peer_systems.memcpy_offload",
        cpu_bytes_to_use=2 * GIB,
        secondary_tiers=[{"type": "fs", "root_dir": str(folder / "stored")}],
    )


LMCACHE = ("lmcache==0.5.6", "sortedcontainers", "aiofile", "aiofiles", "caio")


def lmcache(chunk: int) -> Callable[[Path, Path], tuple[Server, ...]]:
    """LMCache's own server: 2 GiB of L1, files as L2, shared memory towards the engine."""

    def servers(folder: Path, _packages: Path) -> tuple[Server, ...]:
        disk = {"type": "fs", "base_path": str(folder / "stored")}
        command = ("{python}", "-c", "from lmcache.cli.main import main; main()", "server")
        command += ("--host", "127.0.0.1", "--port", str(PORT), "--http-port", str(PORT + 1))
        command += ("--chunk-size", str(chunk), "--l1-size-gb", "2", "--l1-init-size-gb", "2")
        command += ("--eviction-policy", "LRU", "--shm-name", f"kvmarket-peers-{chunk}")
        command += ("--supported-transfer-mode", "engine_driven")  # the other mode wants a GPU
        command += ("--disable-observability", "--l2-adapter", json.dumps(disk))
        return (Server(command, PORT),)

    return servers


def lmcache_engine(_folder: Path) -> dict[str, Any]:
    """LMCacheMPConnector of vLLM, which loads the one that LMCache ships."""
    address = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": PORT}
    return transfer("LMCacheMPConnector", **address)


MOONCAKE = ("mooncake-transfer-engine-non-cuda",)
MOONCAKE_MASTER = "127.0.0.1:50051"


def mooncake(*, standalone: bool) -> Callable[[Path, Path], tuple[Server, ...]]:
    """Mooncake's master, and its store as a separate process if it is asked for."""

    def servers(folder: Path, packages: Path) -> tuple[Server, ...]:
        config = {
            "mode": "standalone-store" if standalone else "embedded",
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": MOONCAKE_MASTER,
            "protocol": "tcp",
            "global_segment_size": 0 if standalone else 3 * GIB,
            "local_buffer_size": GIB,
        }
        (folder / "mooncake.json").write_text(json.dumps(config))
        binaries = packages / "mooncake"
        master = Server(
            (str(binaries / "mooncake_master"), "-rpc_address=127.0.0.1", "-rpc_port=50051")
        )
        if not standalone:
            return (master,)
        store = (str(binaries / "mooncake_client"), "-host=127.0.0.1", "-protocol=tcp")
        store += ("-metadata_server=P2PHANDSHAKE", "-global_segment_size=3 GB")
        store += (f"-master_server_address={MOONCAKE_MASTER}",)
        return (master, Server(store, wait_s=4.0))

    return servers


MOONCAKE_ENVIRONMENT = {
    "MOONCAKE_CONFIG_PATH": "{folder}/mooncake.json",
    "MOONCAKE_REQUESTER_LOCAL_HOSTNAME": "127.0.0.1",
    "VLLM_HOST_IP": "127.0.0.1",
    "MC_TCP_BIND_ADDRESS": "127.0.0.1",
}
DEBIAN = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")


SYSTEMS = (
    System("none", "no cache, and vLLM's prefix cache", lambda _: None, files=False),
    System(
        "example",
        "ExampleConnector",
        lambda folder: transfer("ExampleConnector", shared_storage_path=str(folder / "stored")),
        "vLLM's reference connector: a safetensors file a layer",
    ),
    System(
        "offloading",
        "OffloadingConnector + fs tier (*)",
        offloading,
        "(*) refuses a CPU as shipped; its CUDA copy worker was replaced by a memcpy, by its own"
        " extension point (benchmarks/peer_systems/memcpy_offload.py)",
    ),
    System(
        "lmcache",
        "LMCache 0.5.6, chunk 256",
        lmcache_engine,
        "multiprocess connector, L1 in memory, L2 on disk; 256 is its default",
        packages=LMCACHE,
        servers=lmcache(256),
    ),
    System(
        "lmcache-128",
        "LMCache 0.5.6, chunk 128",
        lmcache_engine,
        "the same with the engine's block size for its chunk",
        packages=LMCACHE,
        servers=lmcache(128),
    ),
    System(
        "mooncake",
        "MooncakeStoreConnector, embedded",
        lambda _: transfer("MooncakeStoreConnector"),
        "the store is in the engine's own memory, over TCP on loopback",
        environment=MOONCAKE_ENVIRONMENT,
        packages=MOONCAKE,
        debian=DEBIAN,
        servers=mooncake(standalone=False),
        files=False,
        survives_engine=False,
        isolated=True,
    ),
    System(
        "mooncake-store",
        "MooncakeStoreConnector, standalone",
        lambda _: transfer("MooncakeStoreConnector"),
        "the store is a separate process, over TCP on loopback; its memory survives the engine",
        environment=MOONCAKE_ENVIRONMENT,
        packages=MOONCAKE,
        debian=DEBIAN,
        servers=mooncake(standalone=True),
        files=False,
        isolated=True,
    ),
    System("kvmarket", "kvmarket", lambda _: None, "default configuration", kvmarket=True),
    System(
        "offloading-shipped",
        "OffloadingConnector as shipped",
        lambda _: transfer("OffloadingConnector", cpu_bytes_to_use=2 * GIB),
        probe=True,
    ),
    System(
        "simple-offload",
        "SimpleCPUOffloadConnector",
        lambda _: transfer("SimpleCPUOffloadConnector", cpu_bytes_to_use=2 * GIB),
        probe=True,
    ),
    System(
        "lmcache-in-process",
        "LMCacheConnectorV1, in the engine",
        lambda _: transfer("LMCacheConnectorV1"),
        environment={"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "2"},
        packages=LMCACHE,
        probe=True,
    ),
)
BY_NAME = {system.name: system for system in SYSTEMS}
