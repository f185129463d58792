"""A model as a folder: config.json (the encoder's sizes) beside the model.safetensors that Trainer writes."""

import json
from dataclasses import asdict
from pathlib import Path

from nystrom.encoder import EncoderConfig, MaskedLM


def save_config(config: EncoderConfig, folder: Path) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps({"architecture": "MaskedLM", **asdict(config)}, indent=2) + "\n")


def load_masked_lm(folder: Path) -> MaskedLM:
    """Read a model that `nystrom pretrain` wrote, in eval mode.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: config.json is not a MaskedLM's; the weights do not fit it.
    """
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; is {folder} the --out folder of 'nystrom pretrain'?"
            )
    try:
        fields = json.loads((folder / "config.json").read_text())
        if not isinstance(fields, dict) or fields.pop("architecture", None) != "MaskedLM":
            raise ValueError("its architecture is not MaskedLM")
        model = MaskedLM(EncoderConfig(**fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: not the config of a nystrom MaskedLM: {error}") from None
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # safetensors raises its own class, torch a RuntimeError
        raise ValueError(f"{folder / 'model.safetensors'}: does not fit {folder / 'config.json'}: {error}") from None
    return model.eval()
