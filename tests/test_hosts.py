"""A run on two hosts: network namespaces of this machine, with a cable between them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nystrom import cli
from nystrom.data.lra import listops, listops_files
from nystrom.data.lra.listops import Limits


class Host(NamedTuple):
    name: str
    address: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if not (shutil.which("ip") and os.geteuid() == 0):
        pytest.skip("network namespaces need root and the command ip (Debian's iproute2)")
    found = [Host(f"nystrom-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2)]
    made = []
    try:
        for host in found:
            done = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"this machine makes no network namespaces: {done.stderr.strip()}")
            made.append(host)
        one, other = (host.name for host in found)
        cable = ["ip", "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other]
        subprocess.run(cable, check=True)
        for host in found:
            subprocess.run(["ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0"], check=True)
            for link in ("lo", "eth0"):
                subprocess.run(["ip", "-n", host.name, "link", "set", link, "up"], check=True)
        yield found
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], check=True)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Of a run on short expressions, but for its folder."""
    found = listops.splits(0, {"train": 60, "dev": 24, "test": 24}, Limits(4, 5, 10, 60))
    (tmp_path / "data").mkdir()
    for name, file in listops_files.FILES.items():
        listops_files.write_file(tmp_path / "data" / file, found[name])
    flags = ["--num-landmarks", "8", "--dev-examples", "16", "--test-examples", "16", "--eval-steps", "4"]
    return ["lra", "listops", "--data", str(tmp_path / "data"), "--precision", "float32", "--lr", "0.01", *flags]


def launch(hosts: list[Host], program: list[str]) -> list[subprocess.Popen[str]]:
    """A process on each host; they meet at the first one's address."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    running = []
    for place, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host.name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"{hosts[0].address}:29400"]
        command += ["--rdzv-conf", f"is_host={int(place == 0)}"]  # by their name, which is one, they cannot tell
        command += ["--nproc-per-node", "1", "--local-addr", host.address, "--no-python", *program]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    return running


def losses(folder: Path) -> list[float]:
    curve = json.loads((folder / "metrics.json").read_text())["curve"]
    return [entry["loss"] for entry in curve if "loss" in entry]


def test_two_hosts_learn_what_one_does(arguments, hosts, tmp_path, monkeypatch):
    arguments += ["--steps", "7"]  # to the end of an epoch, which is short
    still = "import torch; torch.nn.Dropout.forward = lambda self, x: x; from nystrom.cli import main; main()"
    program = [sys.executable, "-c", still, *arguments, "--batch-size", "4", "--out", str(tmp_path / "two")]
    running = launch(hosts, program)
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert all(said.count("test accuracy") == 1 for said, _ in told)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    cli.run([*arguments, "--batch-size", "8", "--out", str(tmp_path / "one")])
    assert len(losses(tmp_path / "one")) == 7
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_a_host_that_is_lost_ends_the_run_on_the_other(arguments, hosts, tmp_path):
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", *arguments, "--batch-size", "4"]
    running = launch(hosts, [*program, "--steps", "100000", "--out", str(tmp_path / "run")])
    try:
        while not list((tmp_path / "run").glob("checkpoint-*/complete")):
            assert all(process.poll() is None for process in running), [p.communicate() for p in running]
            time.sleep(0.05)
        pids = subprocess.run(["ip", "netns", "pids", hosts[1].name], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *pids], check=True)
        _, told = running[0].communicate(timeout=120)
        assert running[0].returncode != 0 and "Connection" in told, told
    finally:
        for process in running:
            process.kill()
            process.communicate()
