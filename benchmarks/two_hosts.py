"""Two hosts, played by two loopback addresses, train together; one is killed in the midst, both start again.

    python -m benchmarks.two_hosts

The commands are those of docs/distributed.md. The host that is left must end by itself, with a message that names a
state, and the run that goes on from there must end at the bits of a run in which nothing happened. Prints one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.forked import exported, final_hashes, write_config
from ldm.training.run_dir import RunDir

ADDRESSES = ("127.0.0.1", "127.0.0.2")


def host(rank: int, port: int, config: Path, log: Path) -> subprocess.Popen[bytes]:
    """torchrun as it is typed on host `rank`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", str(port)]
    command += ["--local-addr", ADDRESSES[rank], "train_autoencoder.py", "--config", str(config)]
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(command, env={**os.environ, **cpu}, stdout=file, stderr=file)


def hosts(config: Path, run: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [host(rank, port, config, run.with_suffix(f".{rank}.log")) for rank in range(2)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = survive(Path(name))
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(0 if report["finished"] and report["told_the_state"] and report["equal"] else 1)


def survive(folder: Path) -> dict[str, object]:
    """Runs undisturbed; then kills host 1 once a state is there, waits for host 0, and runs to the end."""
    whole, run = folder / "whole", folder / "killed"
    config = write_config("one", whole)
    codes = [process.wait() for process in hosts(config, whole)]
    config = write_config("one", run)
    pair = hosts(config, run)
    while not RunDir(run).complete() and pair[0].poll() is None:
        time.sleep(0.05)
    cut_the_power(pair[1])
    left = pair[0].wait(timeout=300)
    told = re.search(r"error: (the connection to another process .*)", run.with_suffix(".0.log").read_text())
    codes += [process.wait() for process in hosts(config, run)]
    return {
        "finished": codes == [0] * 4,
        "exit_code_of_the_other": left,
        "told": told.group(1) if told else None,
        "told_the_state": bool(told and "the last good state is" in told.group(1)),
        "equal": codes == [0] * 4 and final_hashes(whole) == final_hashes(run) and exported(whole) == exported(run),
    }


def cut_the_power(process: subprocess.Popen[bytes]) -> None:
    """Kills torchrun and its workers at once; a worker that outlived its launcher would stop in good order."""
    host = psutil.Process(process.pid)
    for each in [*host.children(recursive=True), host]:
        each.kill()
    process.wait()


if __name__ == "__main__":
    main()
