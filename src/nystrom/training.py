"""What our recipes add to transformers' Trainer: whole checkpoints, time, order. Imports transformers."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, recursively_apply
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from nystrom.hf.base import NystromformerPreTrainedModel
from nystrom.hf.spread import spread_sequence
from nystrom.runs import COMPLETE

TIMES = ("runtime", "samples_per_second", "steps_per_second")
"""What transformers adds to the scores of an evaluation."""


class Checkpoints(TrainerCallback):
    """Checkpoints from which a run ends as if it had never stopped, each marked once all of it is written: a run that
    is killed meanwhile does not use it.
    """

    _postponed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not control.should_save:
            return
        control.should_log = True  # a resumed run's mean of the loss begins here too
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            control.should_save, self._postponed = False, True  # or it would lack the scores taken at an epoch's end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save, self._postponed = control.should_save or self._postponed, False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process has written its state of the random numbers
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end from a checkpoint on, or from the beginning.

    With one from the end, or from where it was stopped early, nothing is left to train, and it is only loaded:
    transformers would take a step more.
    """
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    callbacks = cast(dict[str, Any], state.stateful_callbacks)
    if not callbacks["TrainerControl"]["args"]["should_training_stop"]:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    if trainer.args.load_best_model_at_end:
        checkpoint = checkpoint.parent / f"checkpoint-{state.best_global_step}"  # the folder may have been moved
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            vars(callback).update(callbacks[type(callback).__name__]["attributes"])


class Clock(TrainerCallback, ExportableState):
    """Seconds spent in training steps, evaluation and saving not counted, those before a resume included; every entry
    of the log gets them too. Of several processes all go by the clock of the first: what follows the clock, the
    learning rate or the end, must be the same in each.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begin = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = [time.monotonic() - self._begin]
        self.seconds += broadcast_object_list(passed)[0]

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["seconds"] = round(self.seconds, 3)


def clock(trainer: Trainer) -> Clock:
    """The trainer's clock; a resumed trainer has another than it was given."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))


def curve(trainer: Trainer) -> list[dict[str, Any]]:
    """What was logged of the loss and of the scores, in order; of a step that was scored twice the last."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_score" in entry]
    return list({(entry["step"], "loss" in entry): entry for entry in entries}.values())


class Progress(ProgressCallback):
    """The loss beside the bar, instead of a line of figures at every log; of an evaluation a line with its scores."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        shown = [f"{name} {value:.4f}" for name, value in scores.items() if name not in TIMES]
        if shown:
            self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}", file=sys.stderr)


class LengthGrouped(Sampler[int]):
    """A new order in every epoch, in which neighbours are about as long: less padding. It depends on the seed and the
    epoch alone, so that a resumed run reads what an uninterrupted one reads.

    Args:
        lengths: of all examples (tokens).
        batch_size: examples in a batch (count); groups are of 50 batches.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = 50 * self.batch_size
        batches = []
        for first in range(0, len(order), size):
            group = sorted(order[first : first + size], key=lambda i: self.lengths[i])
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        odd = [batch for batch in batches if len(batch) < self.batch_size]  # at most one: a short batch comes last
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        for place in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[place]
        for batch in odd:
            yield from batch


class GroupedTrainer(Trainer):
    """Trainer whose batches hold examples of about one length (see `LengthGrouped`); `lengths` are the examples', None:
    batches are drawn at random.
    """

    def __init__(self, *, lengths: Sequence[int] | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Trainer takes **kwargs in a model's forward for a promise to divide its loss by all examples of the step, and
        # scales accordingly; BERT's classifier has them and takes the mean of its batch.
        self.model_accepts_loss_kwargs = False
        self._order = None
        if lengths is not None:
            # over all processes, which then wait less for each other, and see at a step what one would
            self._order = LengthGrouped(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)
            self.add_callback(_Epochs(self._order))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order


class _Epochs(TrainerCallback):
    """Tell the order which epoch begins: accelerate does not reach it in a resumed run of several processes."""

    def __init__(self, order: LengthGrouped) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.order.set_epoch(int(state.epoch))


def share_sequences(model: NystromformerPreTrainedModel, sequence: int) -> DeviceMesh | None:
    """All processes as a mesh of data x sequence, each row of `sequence` neighbours sharing the model's inputs; None
    where one process has each for itself.

    Raises:
        ValueError: the processes do not make whole rows; the model's attention cannot be split.
    """
    if sequence == 1:
        return None
    state = PartialState()
    if state.num_processes % sequence:
        raise ValueError(
            f"sequence_processes must divide the number of processes: got {sequence} for {state.num_processes}; start "
            f"more of them with torchrun --nproc-per-node {sequence} --no-python nystrom …"
        )
    # the names that accelerate knows such axes by
    shape, names = (state.num_processes // sequence, sequence), ("dp_replicate", "cp")
    mesh = init_device_mesh(cast(torch.device, state.device).type, shape, mesh_dim_names=names)
    spread_sequence(model, mesh.get_group("cp"))
    return mesh


def read_by_rows(trainer: Trainer, mesh: DeviceMesh | None) -> None:
    """Let the processes of a row read the same batches, and count what they return once."""
    if mesh is None:
        return
    rows, columns = mesh.shape
    gather = trainer.accelerator.gather

    def of_first_column(tensor: Any) -> Any:
        return recursively_apply(lambda x: x.unflatten(0, (rows, columns, -1))[:, 0].flatten(0, 1), gather(tensor))

    trainer.accelerator.state.device_mesh = cast(Any, mesh)
    trainer.accelerator.gather = of_first_column


def show_progress(trainer: Trainer) -> None:
    """A bar with the loss beside it, and a line for each evaluation."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
