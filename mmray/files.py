"""Single files of which the whole URI is known: where one will be published, and what one says."""

from __future__ import annotations

from pathlib import Path

from mmray.errors import ConfigError, DataError, OutputError
from mmray.storage import Folder


def split_uri(uri: str) -> tuple[Folder, str]:
    """Split a file's URI into its folder, and its name in it."""
    place, slash, name = uri.rpartition("/")
    return Folder(place + slash or "."), name


def file_place(uri: str, *, outside: Folder | None = None) -> tuple[Folder, str]:
    """Tell where a file of this URI will be published, before there is work that could be lost.

    Args:
        uri: of the file.
        outside: a folder that must not get it, such as a dataset.

    Returns:
        Its folder, and its name in it.

    Raises:
        ConfigError: the URI names a folder, or lies below a file.
        OutputError: it lies in what it must not lie in.
    """
    folder, name = split_uri(uri)
    path = Path(folder.root)
    below_file = folder.is_local and next(each for each in (path, *path.parents) if each.exists()).is_file()
    if not name or below_file or (folder.is_local and (path / name).is_dir()):
        raise ConfigError(f"{uri} is no place for a file; name the file to write, in a folder")
    if outside and f"{folder}/{name}".startswith(f"{outside}/"):
        raise OutputError(f"{uri} lies in {outside}; write it elsewhere")
    return folder, name


def read_text(uri: str) -> str:
    """Read a text file.

    Raises:
        DataError: there is none, or it is not UTF-8.
    """
    folder, name = split_uri(uri)
    try:
        return folder.read(name).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{uri}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
