"""Several processes that run the same named cases together over gloo, and what came of each case.

    results = ranks.run("library.parallel.cases", 2, tmp_path, seconds=60)
    assert results["a case"] == "ok"

The module named has ``CASES``, functions by name. One launch runs all of them, because starting Python takes longer
than most cases.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path


def run(module: str, world: int, folder: Path, *, seconds: float, cases: Sequence[str] = ()) -> dict[str, str]:
    """Run cases in ``world`` processes.

    Args:
        module: importable from ``tests/``.
        world: number of processes.
        folder: an empty folder for the store and the results.
        seconds: most time for all of it; then every process is killed.
        cases: names; none: all.

    Returns:
        By case "ok", or what went wrong in which process.
    """
    root = Path(__file__).parents[1]
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, "-m", "helpers.ranks", module, str(rank), str(world), str(folder), *cases]
                env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=root))
        end = time.monotonic() + seconds
        # One that fails leaves the others waiting for it.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                raise TimeoutError(f"{module}: not done after {seconds} s\n" + "\n".join(x.read_text() for x in logs))
            time.sleep(0.02)
        time.sleep(0.5 if any(p.poll() for p in processes) else 0.0)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    results: dict[str, str] = {}
    early = []
    for rank, process in enumerate(processes):
        file = folder / f"{rank}.json"
        said = json.loads(file.read_text("utf-8")) if file.exists() else {}
        if process.returncode != 0:
            early.append(f"process {rank} of {module} ended early, after {list(said)}:\n{logs[rank].read_text()}")
        for case, outcome in said.items():
            if outcome != "ok" or case not in results:
                before = "" if results.get(case, "ok") == "ok" else results[case] + "\n"
                results[case] = outcome if outcome == "ok" else f"{before}process {rank}: {outcome}"
    if early:
        wrong = [f"{case}: {outcome}" for case, outcome in results.items() if outcome != "ok"]
        raise RuntimeError("\n".join([*wrong, *early]))
    return results


def main() -> None:
    """One process: joins the others, runs the cases in order, writes what came of them."""
    import torch
    import torch.distributed as dist

    module, rank, world, folder, *names = sys.argv[1:]
    warnings.simplefilter("error")
    store = dist.FileStore(str(Path(folder) / "store"), int(world))
    cases = importlib.import_module(module).CASES
    results = {}
    for name in names or cases:
        # A group for each case: one that fails in the middle leaves messages behind that nobody expects.
        own = dist.PrefixStore(name, store)
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", store=own, rank=int(rank), world_size=int(world), timeout=limit)
        torch.manual_seed(0)
        try:
            cases[name]()
            dist.barrier()
            results[name] = "ok"
        except BaseException:  # noqa: BLE001 - whatever it was, it is reported
            results[name] = traceback.format_exc()
        # Now, because a process that waits for others in vain may be ended by the backend.
        (Path(folder) / f"{rank}.json").write_text(json.dumps(results), "utf-8")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
