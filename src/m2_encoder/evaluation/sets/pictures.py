"""Pictures of a set on disk, as sequences that hold no content and little per picture."""

from __future__ import annotations

import base64
import binascii
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import overload

import numpy as np
import numpy.typing as npt

from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import ImageError, UserError, name_some
from m2_encoder.evaluation.sets.base import Picture

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SHOWN = 3  # names in a message


class Pictures(Sequence[Picture], ABC):
    """Pictures by number; a subclass says how one is read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> Picture: ...

    @overload
    def __getitem__(self, number: slice) -> list[Picture]: ...

    def __getitem__(self, number: int | slice) -> Picture | list[Picture]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"picture {number} of {len(self)}")
        number %= len(self)
        return Picture(self.names[number], partial(self.read, number))

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The content of a picture's file.

        Raises:
            OSError, UserError: if it is not there any more.
        """


class FilePictures(Pictures):
    """Pictures in files of their own; their names are paths below `root`."""

    def __init__(self, root: str | os.PathLike[str], names: Sequence[str]) -> None:
        super().__init__(names)
        self.root = os.fspath(root)

    def read(self, number: int) -> bytes:
        """The content of a picture's file."""
        path = os.path.join(self.root, self.names[number])
        try:
            return read_picture_file(path)
        except ImageError as error:
            raise ImageError(f"{path}: {error.text}") from error


class PartPictures(Pictures):
    """Pictures that are parts of larger files, such as tars.

    Args:
        names: of the pictures, length n.
        paths: of the larger files.
        parts: number of the larger file, offset and size in bytes of each picture, (n, 3) int64.
        base64: whether the parts are text that spells bytes.
    """

    def __init__(
        self, names: Sequence[str], paths: Sequence[str], parts: npt.NDArray[np.int64], *, base64: bool = False
    ) -> None:
        super().__init__(names)
        self.paths, self.parts, self.base64 = paths, parts, base64

    def read(self, number: int) -> bytes:
        """The content of a picture's file."""
        file_number, offset, size = self.parts[number].tolist()
        path = self.paths[file_number]
        content = read_part(path, offset, size)
        if not self.base64:
            return content
        try:
            return base64.b64decode(content.strip().translate(_URL_SAFE), validate=True)
        except binascii.Error as error:
            raise ImageError(f"{path}: {self.names[number]} is not base64: {error}") from error


def read_part(path: str, offset: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        OSError, UserError: if they are not there any more.
    """
    with open(path, "rb") as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise UserError(f"{path}: is shorter than it was, {len(content)} of {size} bytes at {offset}")
    return content


def find_missing(root: str | os.PathLike[str], names: Sequence[str]) -> list[str]:
    """Which files below a folder are not there; each folder is listed once, whatever the number of files."""
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for name in names:
        parent, _, file = name.rpartition("/")
        if parent not in listed:
            try:
                listed[parent] = frozenset(os.listdir(os.path.join(root, parent)))
            except OSError:
                listed[parent] = frozenset()
        if file not in listed[parent]:
            missing.append(name)
    return missing


def require_files(root: str | os.PathLike[str], names: Sequence[str], *, listed_by: str) -> None:
    """Raise a `UserError` unless all files that `listed_by` names are below `root`."""
    if missing := find_missing(root, names):
        raise UserError(
            f"{listed_by}: {len(missing):,} of {len(names):,} pictures are not in {root}: "
            f"{name_some(missing, _SHOWN)}; complete the download, or say with images=FOLDER where they are"
        )


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name; hidden files are not."""
    return not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)
