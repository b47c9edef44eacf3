"""Several processes that run the same named cases together over gloo, and what came of each case.

    results = ranks.run(["helpers.sequence_cases"], 2, tmp_path, seconds=60)
    assert results["sequence: causal"] == "ok"

The modules named have ``CASES``, functions by name. One launch runs all of them, and its processes are forks of one
that has imported torch: starting Python takes longer than most cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path


def run(
    modules: Sequence[str], world: int, folder: Path, *, seconds: float, cases: Sequence[str] = ()
) -> dict[str, str]:
    """Run cases in ``world`` processes.

    Args:
        modules: importable from ``tests/``.
        world: number of processes.
        folder: an empty folder for the store and the results.
        seconds: most time for all of it; then every process is killed.
        cases: names, each behind that of its module without ``_cases``; none: all.

    Returns:
        By case "ok", or what went wrong in which process.
    """
    module = ",".join(modules)
    root, log = Path(__file__).parents[1], folder / "log"
    command = [sys.executable, "-m", "helpers.ranks", module, str(world), str(folder), *cases]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("w") as out:
        # A session of its own: killing it reaches the forks too.
        parent = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True
        )
    try:
        status = parent.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{module}: not done after {seconds} s\n{log.read_text()}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    results: dict[str, str] = {}
    for rank in range(world):
        file = folder / f"{rank}.json"
        for case, outcome in (json.loads(file.read_text("utf-8")) if file.exists() else {}).items():
            before = "" if results.get(case, "ok") == "ok" else results[case] + "\n"
            if outcome != "ok" or case not in results:
                results[case] = outcome if outcome == "ok" else f"{before}process {rank}: {outcome}"
    if status != 0:
        wrong = [f"{case}: {outcome}" for case, outcome in results.items() if outcome != "ok"]
        raise RuntimeError("\n".join([*wrong, f"a process of {module} ended early:", log.read_text()]))
    return results


def main() -> int:
    """Fork the processes, and wait for them; the first that fails ends the others."""
    module, size, folder, *names = sys.argv[1:]
    world = int(size)
    cases = {
        f"{name.rpartition('.')[2].removesuffix('_cases')}: {case}": check
        for name in module.split(",")
        for case, check in importlib.import_module(name).CASES.items()
    }
    children = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = process(rank, world, Path(folder), cases, names)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[pid] = rank
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        if status != 0:
            print(f"process {rank} ended with status {status}", flush=True)
            time.sleep(1.0)  # the others may have something to say about it
            return 1
    return 0


def process(rank: int, world: int, folder: Path, cases: dict, names: Sequence[str]) -> int:
    """One process: joins the others, runs the cases in order, writes what came of them."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    store = dist.FileStore(str(folder / "store"), world)
    results = {}
    for name in names or cases:
        # A group for each case: one that fails in the middle leaves messages behind that nobody expects.
        own = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        torch.manual_seed(0)
        try:
            cases[name]()
            dist.barrier()
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
        # Now, because a process that waits for others in vain may be ended by the backend.
        (folder / f"{rank}.json").write_text(json.dumps(results), "utf-8")
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
