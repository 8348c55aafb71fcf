"""What it takes to copy weights out of another process' memory on the GPU beside.

    python benchmarks/replica_copy.py --json benchmarks/results/replica_copy.json

One process has pages on the first GPU and sends descriptors of them; the other imports, maps and
copies them to the second, and compares their sums. In turn each sees both GPUs, or only its own;
the first runs nothing, or kernels out of a busy interpreter; last it is killed before the copy.
Needs two GPUs with 17 GiB free each; `--devices 0 0` rehearses on one.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from parts.lent_pages import NUM_BYTES, Lender
from parts.lent_reader import Reader
from parts.machine import describe_gpu
from parts.record import write

from kvcached_core.errors import BackendError


def measure(devices: list[int], *, is_apart: bool) -> dict[str, Any]:
    """Return what two processes found that see both GPUs, or only their own."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    children = []
    for role, end, device in zip(("lender", "reader"), ends, devices, strict=True):
        environ = dict(os.environ)
        if is_apart:
            environ["CUDA_VISIBLE_DEVICES"] = str(device)
        words = ["--role", role, "--socket", str(end.fileno())]
        words += ["--devices", *(["0"] if is_apart else [str(device)])]
        words += [] if is_apart else ["--whole"]
        children.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                env=environ,
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE if role == "reader" else None,
                text=True,
            )
        )
        end.close()
    lender, reader = children
    output, _ = reader.communicate()
    lender.kill()
    lender.wait()
    lines = output.splitlines()
    return json.loads(lines[-1]) if lines else {"error": f"the reader ended: {reader.returncode}"}


def table(results: dict[str, Any]) -> str:
    """Return what happened, a line each."""
    lines = []
    for sight in ("both", "apart"):
        found = results.get(sight, {})
        if "error" in found:
            lines.append(f"{sight}: {found['error']}")
        for name, row in found.items():
            for run in ("first", "idle", "busy"):
                if isinstance(row, dict) and run in row:
                    one = row[run]
                    lines.append(
                        f"{sight}, pages of {name}, {run}: all copied after "
                        f"{one['copied_ms']:.1f} ms, sums {one['sums_ms']:.1f} ms, a copy alone "
                        f"{one['copy_gb_per_second']:.0f} GB/s, right {one['is_right']}; export "
                        f"{one['lender_ms']['export']:.1f}, import and map "
                        f"{sum(one['imported_ms'][verb] for verb in ('create', 'map')):.1f}, drop "
                        f"{sum(one['imported_ms'][verb] for verb in ('unmap', 'release')):.1f} ms"
                    )
        if "killed" in found:
            lines.append(f"{sight}: right after a kill {found['killed']['is_right']}")
        if "link_gb_per_second" in found:
            lines.append(f"the link to host memory: {found['link_gb_per_second']:.1f} GB/s")
    return "\n".join(lines)


def main() -> None:
    """Measure, or be one of the two processes."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--json", type=Path)
    made.add_argument("--devices", type=int, nargs="+", default=[0, 1])
    made.add_argument("--role", choices=("lender", "reader"), help=argparse.SUPPRESS)
    made.add_argument("--socket", type=int, help=argparse.SUPPRESS)
    made.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.role is not None:
        line = socket.socket(fileno=options.socket)
        if options.role == "lender":
            Lender(line, options.devices[0]).run()
            return
        try:
            found = Reader(line, options.devices[0]).run(is_whole=options.whole)
        except (BackendError, OSError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found))
        return
    machine = describe_gpu() | {"num_gpus": torch.cuda.device_count()}
    results: dict[str, Any] = {"machine": machine, "num_bytes": NUM_BYTES}
    if len(set(options.devices)) > 1:
        one, other = options.devices
        results["peer_access"] = torch.cuda.can_device_access_peer(other, one)
    for sight, is_apart in (("both", False), ("apart", True)):
        results[sight] = measure(options.devices, is_apart=is_apart)
        if options.json:
            write(options.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
