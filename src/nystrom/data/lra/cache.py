"""Arrays kept in a file: one .npz, not compressed, with a checksum and how they were made."""

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ABOUT = "about"
_DAMAGE = (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile)


def write(path: Path, arrays: Mapping[str, np.ndarray], made: Mapping[str, Any]) -> None:
    """Write the whole file or none; numpy can read it too. Several processes may write it at once: the last one stays.

    Args:
        path: ends with .npz; one that is there is replaced.
        arrays: by name; any but "about".
        made: how; what JSON can hold.
    """
    about = json.dumps({"made": made, "checksum": _checksum(arrays)})
    content: dict[str, Any] = {_ABOUT: np.array(about), **arrays}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, names: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that `write` wrote, and how they were made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds other arrays than those of these names.
    """
    try:
        with open(path, "rb") as packed, np.load(packed, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name != _ABOUT}
            about = json.loads(str(file[_ABOUT]))
        checksum, made = about["checksum"], about["made"]
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise ValueError(f"{path}: not a file of cached arrays, or a damaged one: {error}; delete it") from None
    if set(found) != set(names):
        raise ValueError(f"{path}: holds {', '.join(sorted(found))}, not {', '.join(sorted(names))}; delete it")
    if checksum != _checksum(found):
        raise ValueError(f"{path}: its checksum is not that of its content; delete it")
    return found, made


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
