"""The files of a pretrained model's folder: found, checked, and those beside its weights copied to a converted one."""

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from nystrom.hf.settings import ATTENTIONS

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
KEPT = (
    *TOKENIZER,
    *("chat_template*", "processor_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
)
"""Files beside weights and config.json that the model needs, its licence among them."""


def find(name: str, allow_pickle: bool) -> Path:
    """The folder of a model; one from the Hugging Face Hub is downloaded where it is not there yet.

    Raises:
        OSError: there is no such model, or the hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name}: not a folder; name the folder that holds config.json")
    if folder.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    wanted = [*KEPT, "config.json", "README.md", "[0-9]*_*/*.json", "*.safetensors", "model.safetensors.index.json"]
    unwanted = ["onnx/*", "openvino/*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
        if allow_pickle and not any((folder / file).is_file() for file in SAFE):
            wanted += [*PICKLES, "pytorch_model-*.bin", "[0-9]*_*/pytorch_model.bin"]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"{name}: no such folder, and no model to be had from the Hugging Face Hub: {first}") from None
    return folder


def check_tokenizer(folder: Path) -> None:
    """Raise FileNotFoundError where a folder has no tokenizer: transformers would make one up."""
    if not any(fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in TOKENIZER):
        raise FileNotFoundError(f"{folder}: no tokenizer in this folder; pass --tokenizer")


def check_folder(folder: Path, allow_pickle: bool) -> dict[str, Any]:
    """What config.json says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are only pickled weights, and they are not allowed; the model is a converted one.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {folder} a Hugging Face model's folder?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold the fields of a config: got {config!r}")
    if "nystrom" in config or config.get("attn_implementation") in ATTENTIONS or config.get("model_type") == "nystrom":
        own = config.get("model_type") == "nystrom"
        raise ValueError(
            f"{folder}: converted already; convert the model that it was made from, or change its settings "
            + ("in its config.json" if own else "with nystrom.hf.configure")
        )
    if not any((folder / file).is_file() for file in SAFE):
        pickles = [file for file in PICKLES if (folder / file).is_file()]
        if not pickles:
            hint = "" if allow_pickle else "; if it has pickled ones, --allow-pickle reads them"
            raise FileNotFoundError(f"{folder / SAFE[0]}: no such file, and no other weights that can be read{hint}")
        if not allow_pickle:
            raise ValueError(
                f"{folder}: its weights are pickled ({pickles[0]}), and a pickle can run code; --allow-pickle reads "
                "its tensors and refuses everything else in it"
            )
    if not any(fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in TOKENIZER):
        raise FileNotFoundError(f"{folder}: no tokenizer in this folder")
    return config


def copy_files(source: Path, out: Path, length: int | None, tokenizer: str, allow_pickle: bool) -> None:
    """Tokenizer, of the class named, licence and what sentence-transformers needs; with a length, they are told of it.

    Raises:
        ValueError: modules.json names a folder outside of the model's; a file that holds a length is not JSON; a module
            has nothing but pickled weights, which are not allowed or hold more than tensors.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in KEPT):
            shutil.copyfile(file, out / file.name)
    if (source / "modules.json").is_file():
        for module in _json(source / "modules.json"):
            if module["path"]:
                _copy_module(source, module["path"], out, allow_pickle)
    config = out / "tokenizer_config.json"
    fields = (_json(config) if config.exists() else {}) | ({} if length is None else {"model_max_length": length})
    fields.setdefault("tokenizer_class", tokenizer)  # else it would depend on the type of model
    config.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")
    for file in out.iterdir() if length is not None else ():
        if fnmatch(file.name, "sentence_*_config.json") and _json(file).get("max_seq_length") is not None:
            _change(file, {"max_seq_length": length})
        elif file.name == "tokenizer.json" and (cut := _json(file).get("truncation")) is not None:
            _change(file, {"truncation": cut | {"max_length": length}})


def _copy_module(source: Path, path: str, out: Path, allow_pickle: bool) -> None:
    """A module of sentence-transformers, such as 1_Pooling; one without files may be missing, as git drops it."""
    from safetensors.torch import save_file

    folder, copy = source / path, out / path
    if not copy.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{source / 'modules.json'}: names a folder outside of the model's: {path!r}")
    if not folder.is_dir():
        return
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.bin", "*.py", "__pycache__"))
    pickled = folder / PICKLES[0]
    if pickled.exists() and not (folder / SAFE[0]).exists():
        if not allow_pickle:
            raise ValueError(f"{pickled}: pickled, and a pickle can run code; --allow-pickle reads its tensors")
        try:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise refused(pickled, error) from None
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / SAFE[0])


def refused(path: Path, error: UnpicklingError) -> ValueError:
    """Without torch's words, which tell how to load it all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return ValueError(f"{path}: holds more than tensors, or is damaged" + (f": it names {found[1]}" if found else ""))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _change(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(_json(path) | fields, ensure_ascii=False), encoding="utf-8")
