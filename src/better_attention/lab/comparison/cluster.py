"""A Ray cluster: this machine's own for the time of a command, or one that runs already.

Ray is an extra, imported here and in :mod:`.ray_engine` alone, and only when it is asked for. Its usage statistics and
its dashboard stay off.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from better_attention.text import plural

ANSWER_SECONDS = 5.0
"""For which an address is tried."""
HEALTH_SECONDS = 30.0
"""For which a cluster may take to say that it is well: most of it is the start of Python."""
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the runs of a comparison are trained.

    Args:
        address: ``HOST:PORT`` of a Ray cluster that this machine is part of; None: a cluster of this machine alone, for
            the time of the command.
        cpus_per_run: CPUs that a run has to itself, which are its threads.
        gpus_per_run: GPUs likewise; 0: runs are trained on CPUs.

    Raises:
        ValueError: an address of another form.
    """

    address: str | None = None
    cpus_per_run: int = 1
    gpus_per_run: int = 0

    def __post_init__(self) -> None:
        if self.address is not None and not _ADDRESS.fullmatch(self.address):
            raise ValueError(
                f"--address must be HOST:PORT, such as 10.0.0.1:6379, received {self.address!r}: the address that "
                "`ray start --head` prints. This machine joins that cluster by `ray start --address HOST:PORT`."
            )

    @property
    def device(self) -> str:
        """The kind of device that runs are trained on."""
        return "cuda" if self.gpus_per_run else "cpu"


def imported() -> Any:
    """Ray, with its statistics off.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the meaning that later versions have
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        # Without a name, so that the command shows it as it is.
        raise ImportError('--engine ray needs Ray: pip install "better-attention[ray]"') from None
    return ray


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to the cluster while the context lasts.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the cluster does not answer, refuses this machine, or has no machine with that many CPUs or GPUs.
        OSError: Ray could not be started on this machine.
    """
    ray = imported()
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if cluster.address is None:
        # Ray would write a token of its own into the user's home folder.
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        settings["address"] = "local"
    else:
        check_answers(cluster.address)
        settings["address"] = cluster.address
    try:
        ray.init(**settings)
    except Exception as error:
        if cluster.address is None:
            raise OSError(
                f"--engine ray: Ray could not be started on this machine: {first_line(error)}. Close other programs if "
                "it is overloaded, or use --engine local."
            ) from error
        raise ValueError(
            f"--address {cluster.address}: this machine could not join that Ray cluster: {first_line(error)}. It has "
            "to be part of it (`ray start --address HOST:PORT`), with the same versions of Ray and Python and the same "
            "token (RAY_AUTH_TOKEN, or ~/.ray/auth_token)."
        ) from error
    try:
        check_resources(ray.nodes(), cluster)
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Make sure that a Ray cluster answers at ``address``: Ray itself would try for minutes, then end the process.

    Raises:
        ValueError: nobody answers there, or something else than a Ray cluster.
    """
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--address {address}: nobody answers there ({error}). Start a cluster with `ray start --head` and give "
            "the address that it prints, or omit --address to use this machine alone."
        ) from None
    # In a process of its own, because a client of Ray that cannot go on ends its process.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=HEALTH_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise ValueError(
            f"--address {address}: what answers there is no Ray cluster of this version, or it wants another token "
            "(RAY_AUTH_TOKEN, or ~/.ray/auth_token). `ray status` on its first machine says whether it is well."
        )


def check_resources(nodes: list[dict[str, Any]], cluster: Cluster) -> None:
    """Make sure that some machine can train a run; Ray would wait for one for ever.

    Args:
        nodes: what Ray says of each machine.
        cluster: what is asked for.

    Raises:
        ValueError: none has that many CPUs and GPUs.
    """
    alive = [node["Resources"] for node in nodes if node.get("Alive")]
    if not any(
        node.get("CPU", 0) >= cluster.cpus_per_run and node.get("GPU", 0) >= cluster.gpus_per_run for node in alive
    ):
        most = {kind: int(max((node.get(kind, 0) for node in alive), default=0)) for kind in ("CPU", "GPU")}
        wanted = [
            plural(cluster.cpus_per_run, "CPU"),
            *([plural(cluster.gpus_per_run, "GPU")] * (cluster.gpus_per_run > 0)),
        ]
        raise ValueError(
            f"--cpus-per-run, --gpus-per-run: no machine of the cluster has {' and '.join(wanted)}; at most "
            f"{plural(most['CPU'], 'CPU')} and {plural(most['GPU'], 'GPU')} in one machine."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
