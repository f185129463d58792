"""Train where no process holds a whole sequence: a mesh of processes, rows for data and columns for tokens.

    torchrun --nproc-per-node 4 examples/sequence_parallel.py --text book.txt --sequence 2

Here two processes share each sequence, half of its tokens each, and two such pairs share the batch. The losses are
those of one process. With --shard no process holds a whole model either (FSDP2), and what --checkpoint writes, each
process its own part, goes on with any other number of processes. On GPUs the same program runs over NCCL.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nystrom import EncoderConfig, MaskedLM
from nystrom.distributed import split_sequence

MASK = 256  # the id after those of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="what to learn, byte by byte")
    parser.add_argument("--sequence", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shard", action="store_true", help="parameters, gradients and moments are shared out as well")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to write to at the end")
    given = parser.parse_args()

    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // given.sequence, given.sequence), mesh_dim_names=("data", "sequence")
    )
    row, column = mesh.get_local_rank("data"), mesh.get_local_rank("sequence")

    torch.manual_seed(0)  # the same weights everywhere
    config = EncoderConfig(vocab_size=257, max_length=given.length, embed_dim=128, num_layers=2, dropout=0.0)
    model = split_sequence(MaskedLM(config), mesh.get_group("sequence")).to(device)
    learner: torch.nn.Module = model  # either averages gradients over all processes, whichever share a sequence
    if given.shard:
        everyone = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*model.encoder.blocks, model):
            fully_shard(part, mesh=everyone)
    else:
        learner = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = 0 if given.checkpoint is None else load(model, optimizer, given.checkpoint)

    text = torch.frombuffer(bytearray(given.text.read_bytes()), dtype=torch.uint8).long()
    for step in range(done, given.steps):
        ids, labels = batch(text, given.batch, given.length, step)
        # this process's sequences, and of these its stretch
        ids, labels = (
            x.tensor_split(mesh.size(0))[row].tensor_split(mesh.size(1), 1)[column].to(device) for x in (ids, labels)
        )
        loss = learner(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean:.4f}, {ids.shape[0]} x {ids.shape[1]} tokens a process", flush=True)
    if given.checkpoint is not None and done < given.steps:
        save(model, optimizer, given.checkpoint / f"step-{given.steps}")
    dist.destroy_process_group()


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Every process writes what it holds; `.metadata` comes last, so that a folder without it is half-written."""
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Take up the last whole checkpoint, where there is one, and say how many steps it has seen."""
    whole = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/.metadata")]
    if not whole:
        return 0
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / f"step-{max(whole)}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(whole)


def batch(text: torch.Tensor, size: int, length: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every process: stretches of the text, an eighth of each masked, and what was there."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length + 1, (size, 1), generator=generator)
    ids = text[starts + torch.arange(length)]
    chosen = torch.rand(size, length, generator=generator).argsort(1) < length // 8  # as many in each sequence
    return ids.masked_fill(chosen, MASK), ids.masked_fill(~chosen, -100)


if __name__ == "__main__":
    main()
