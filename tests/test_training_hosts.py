"""Two hosts, made of network namespaces with a cable between them: one run, by DeepSpeed's launcher and by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from training_helpers import environment, losses, options, small_data

from fastclip.training.__main__ import main

TIMEOUT = 300
HOSTS = ("fastclip-a", "fastclip-b")
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, ...]]:
    with ExitStack() as stack:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
                stack.callback(ip, "netns", "delete", host)
            ip("link", "add", "fc-a", "netns", HOSTS[0], "type", "veth", "peer", "name", "fc-b", "netns", HOSTS[1])
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces are not permitted")
        for host, cable, address in zip(HOSTS, ("fc-a", "fc-b"), ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", host, "link", "set", cable, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS


def words(launcher: str, node: int, hostfile: Path) -> list[str]:
    python = [sys.executable, "-m"]
    if launcher == "deepspeed":
        cluster = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), "--num_nodes", "2"]
        cluster += ["--num_accelerators", "1", "--master_addr", ADDRESSES[0], "--master_port", "29511"]
        return [*python, "deepspeed.launcher.runner", *cluster, "--module"]
    cluster = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
    return [*python, "torch.distributed.run", *cluster, "--master_addr", ADDRESSES[0], "--master_port", "29512", "-m"]


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_on_two_hosts_gives_the_curve_of_one(hosts: tuple[str, ...], tmp_path: Path, launcher: str) -> None:
    data, out = small_data(tmp_path / "data"), tmp_path / "out"
    assert main(options(data, tmp_path / "one", engine="torch")) == 0
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    with ExitStack() as stack:
        running = []
        for node, (host, cable) in enumerate(zip(hosts, ("fc-a", "fc-b"), strict=True)):
            command = ["ip", "netns", "exec", host, *words(launcher, node, hostfile), "fastclip.training"]
            own = environment() | {"GLOO_SOCKET_IFNAME": cable, "PATH": os.environ["PATH"]}
            process = subprocess.Popen(
                [*command, *options(data, out, zero_stage=2)],
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            said, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, said
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
