"""Ranks: processes that stay for a whole test module and run its functions together, and programs under torchrun."""

import multiprocessing as mp
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil


class Ranks:
    """Up to `most` ranks; the first few of them make the group of a smaller number.

    Args:
        most: ranks (count).
        folder: an empty one, to meet in.
        checked: import the package with its shape annotations checked, as pytest's hook does here.
    """

    def __init__(self, most: int, folder: Path, checked: bool) -> None:
        spawn = mp.get_context("spawn")
        ends = [spawn.Pipe() for _ in range(most)]
        meeting = f"file://{folder / 'meeting'}"
        self.pipes = [here for here, _ in ends]
        self.processes = [
            spawn.Process(target=_work, args=(rank, most, meeting, there, checked), daemon=True)
            for rank, (_, there) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args, ranks: int) -> list:
        """function(group, *args) on each of so many ranks; an exception comes back in the place of a result."""
        for pipe in self.pipes[:ranks]:
            pipe.send((function, args, ranks))
        answers = []
        for pipe in self.pipes[:ranks]:
            if not pipe.poll(120):
                for process in self.processes:
                    process.kill()
                raise AssertionError(f"rank {len(answers)} does not answer")
            answers.append(pipe.recv())
        crashed = [told for result, told in answers if told and not isinstance(result, ValueError)]
        assert not crashed, crashed[0]
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def _work(rank, most, meeting, pipe, checked) -> None:
    if checked:
        from jaxtyping import install_import_hook

        install_import_hook("nystrom", "beartype.beartype")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=most, timeout=timedelta(seconds=60))
    groups = {count: dist.new_group(list(range(count))) for count in range(1, most + 1)}
    while (task := pipe.recv()) is not None:
        function, args, ranks = task
        torch.manual_seed(rank)
        try:
            pipe.send((function(groups[ranks], *args), None))
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
    dist.destroy_process_group()


def torchrun(program: list[str], *options: str) -> subprocess.Popen:
    """Two processes of a program."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, "--monitor-interval", "0.2", *options, *program]
    # without the latter, torch's gloo looks for the processes that came before a restart, at their addresses
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_rank(process: subprocess.Popen, moment: Callable[[], bool], rank: str) -> None:
    """Kill one of the processes that torchrun has started, at that moment."""
    end = time.monotonic() + 200
    while not moment() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    assert process.poll() is None and moment()
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == rank]
    assert len(workers) == 1
    workers[0].kill()
