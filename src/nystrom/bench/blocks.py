"""A step through an encoder's blocks, each rank a fresh process of this machine: time, memory and what ranks send."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nystrom import memory
from nystrom.bench.ranks import Sent
from nystrom.distributed import split_sequence
from nystrom.encoder import Block, EncoderConfig
from nystrom.streaming import stream_blocks

WARM = 128
"""Tokens of the first steps, which load the kernels and their thread pools."""
MAPPED = 2**25
"""Bytes from which on glibc gives a tensor memory of its own, and back to the system afterwards."""
CALLS, SECONDS = 3, 4.0
"""Steps that are timed in a process; one alone where it takes longer than that."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is done."""

    n: int
    """Tokens, of all ranks together."""
    layers: int
    """Blocks (count)."""
    ranks: int
    """Processes that hold a stretch each (count)."""
    embed_dim: int
    """c, model width."""
    heads: int
    """Heads per block (count)."""
    ffn_dim: int
    """Width inside the feed-forward parts."""
    kind: Literal["nystrom", "shift"]
    """Attention."""
    num_landmarks: int
    """Landmarks (count)."""
    conv_kernel_size: int | None
    """Tokens spanned by the convolution skip."""
    batch: int
    """Sequences at a time (count)."""
    chunk: int | None
    """Tokens at a time where blocks are streamed."""
    train: bool
    """Forward and backward, the gradients averaged over the ranks; else forward alone."""
    threads: int
    """Threads of each process."""


class Cost(NamedTuple):
    """Of one step, on one rank."""

    seconds: float
    memory: float
    """Bytes beyond the weights and the input: what the step makes, gradients included."""
    bytes_sent: int
    """Of tensors given to collectives."""


def blocks(step: Step) -> nn.Sequential:
    """The model.

    Raises:
        ValueError: sizes that do not go together; blocks that cannot be streamed.
    """
    sizes = EncoderConfig(
        vocab_size=1,
        embed_dim=step.embed_dim,
        num_heads=step.heads,
        ffn_dim=step.ffn_dim,
        kind=step.kind,
        num_landmarks=step.num_landmarks,
        conv_kernel_size=step.conv_kernel_size,
        dropout=0.0,
    )
    made = nn.Sequential(*(Block(sizes) for _ in range(step.layers)))
    return made if step.chunk is None else stream_blocks(made, step.chunk)


def launch(step: Step, copies: int = 1, part: float = 1.0) -> list[Cost]:
    """What each rank needs.

    Args:
        step: what is done.
        copies: as often at once, of a step on one rank: what processes take from each other on one machine (count).
        part: what part this is of the step that it stands for: memory is then treated as that one's is.

    Raises:
        RuntimeError: a process failed, or was killed for want of memory.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(step.threads)}
    if part < 1:  # larger tensors come fresh from the system: that takes time, and leaves no holes where they were
        least = round(MAPPED * part)
        environment = {"MALLOC_MMAP_THRESHOLD_": f"{least}", "MALLOC_TRIM_THRESHOLD_": f"{2 * least}"} | environment
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nystrom.bench.blocks",
                    json.dumps(asdict(step)),
                    str(rank),
                    f"{folder}/meeting",
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(max(step.ranks, copies))
        ]
        told = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, told, strict=True):
        if process.returncode != 0:
            how = "was killed, perhaps for want of memory" if process.returncode < 0 else "failed"
            what = f"{step.layers} blocks of {step.n:,} tokens on {step.ranks} ranks"
            raise RuntimeError(f"{what}: a process {how}:\n{errors}")
    return [Cost(*json.loads(said)) for said, _ in told]


def work(step: Step, rank: int, meeting: str) -> Cost:
    """One rank's part."""
    torch.set_num_threads(step.threads)
    torch.manual_seed(0)
    model: nn.Module = blocks(step)
    if step.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=step.ranks)
        split_sequence(model)
        if step.train:
            model = nn.parallel.DistributedDataParallel(model)
    own = step.n // step.ranks + (rank < step.n % step.ranks)

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        shape = step.batch, n, step.embed_dim
        return torch.randn(shape, requires_grad=step.train), torch.randn(shape)

    def call(x: Tensor, grad: Tensor) -> None:
        with nullcontext() if step.train else torch.no_grad():
            out = model(x)
        if step.train:
            out.backward(grad)
            x.grad = None
            model.zero_grad()

    def timed() -> float:
        if step.ranks > 1:
            dist.barrier()
        start = perf_counter()
        call(*given)
        return perf_counter() - start

    for _ in range(2):  # in the second, DistributedDataParallel sorts its gradients anew, and tells the other ranks
        call(*inputs(min(WARM, own)))
    given = inputs(own)
    before = memory.reset_host_peak()
    with Sent() if step.ranks > 1 else nullcontext() as sent:
        first = torch.tensor(timed())
    peak = memory.host_peak_above(before)
    if step.ranks > 1:
        dist.all_reduce(first, dist.ReduceOp.MAX)  # as often on all
    times = [timed() for _ in range(CALLS if first < SECONDS else 1)]
    if step.ranks > 1:
        dist.destroy_process_group()
    return Cost(median(times), peak, 0 if sent is None else sent.bytes)


if __name__ == "__main__":
    print(json.dumps(work(Step(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])))
