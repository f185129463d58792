"""Training from a checkpoint on."""

from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_model
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end from a checkpoint on, or from the beginning.

    With one of the last step nothing is left to train, and it is only loaded: transformers would take a step more.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            assert trainer.model is not None
            load_model(trainer.model, checkpoint / "model.safetensors")
            trainer.state = state
            saved = cast(dict[str, Any], state.stateful_callbacks)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ExportableState):
                    vars(callback).update(saved[type(callback).__name__]["attributes"])
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
