"""Files out of tar archives."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path


def read(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted files, in the archive's order; nothing is unpacked on disk.

    Args:
        path: .tar, .tar.gz, .tar.xz or .tar.bz2, whatever it is called.
        is_wanted: of a file's name.

    Raises:
        OSError: unreadable.
        ValueError: not an archive, or one that is damaged or cut short; found when the place is reached.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if is_wanted(member.name) and member.isfile() and (file := archive.extractfile(member)):
                    yield member.name, file.read()
            _check_end(archive)
    except (tarfile.TarError, EOFError, LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the archive's
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: not a tar archive, or a damaged one ({reason}); get it again") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise unless the archive has its end mark, which tarfile would not miss; read on, so that checksums count."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it stops before its end mark")
    while file.read(1 << 20):
        pass
