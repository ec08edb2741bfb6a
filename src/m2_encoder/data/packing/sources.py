"""Kinds of sources, and which kind a source is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.packing.lines import slice_chinese_clip, slice_json_lines
from m2_encoder.data.packing.listed import ClassTexts, has_pair, slice_csv, slice_folder
from m2_encoder.data.packing.records import Columns, Slice
from m2_encoder.data.packing.tables import slice_parquet
from m2_encoder.data.shards.paths import find_files
from m2_encoder.errors import UserError

Format: TypeAlias = Literal["folder", "jsonl", "csv", "chinese_clip", "parquet"]
FORMATS = get_args(Format)
"""Kinds of sources that can be packed."""

_IMAGES_ENDING, _TEXTS_ENDING = "_imgs.tsv", "_texts.jsonl"  # of Chinese-CLIP's two files
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}


class Source(NamedTuple):
    """Something to pack."""

    format: str  # one of `FORMATS`
    paths: tuple[Path, ...]  # its files; of a folder, the folder
    texts: Path | None  # Chinese-CLIP's second file
    root: str | None  # where relative paths of images count from; None is the folder of each table
    columns: Columns  # what the columns of a table mean; also says languages, and what to keep, of the others
    encoding: str | None = None  # of CSV tables; None detects it
    left_out: tuple[Path, ...] = ()  # tables beside the images of a folder
    classes: Mapping[str, ClassTexts] | None = None  # by folder, of a folder of classes

    def slices(self, size: int) -> Iterator[Slice]:
        """Cut it into slices of `size` records; those of a table's last slice may be fewer.

        Raises:
            UserError: if it holds nothing that could be packed.
        """
        language = self.columns.default_language
        if self.format == "folder":
            more: dict[str, Any] = {"extra": self.columns.extra, "classes": self.classes}
            return slice_folder(self.paths[0], size, language=language, **more)
        if self.format == "chinese_clip":
            assert self.texts is not None, "find_source gives both files"
            return slice_chinese_clip(self.paths[0], self.texts, size, language=language)
        if self.format == "parquet":
            return slice_parquet(self.paths, size, self.columns, root=self.root)
        if self.format == "csv":
            return slice_csv(self.paths, size, self.columns, root=self.root, encoding=self.encoding)
        return slice_json_lines(self.paths, size, self.columns, root=self.root)


def find_source(
    source: str | Sequence[str],
    *,
    columns: Columns,
    format: str | None = None,
    texts: str | None = None,
    image_root: str | None = None,
    encoding: str | None = None,
) -> Source:
    """Find the files of a source and say what kind it is.

    Args:
        source: a folder of images, or with a pair of files in Chinese-CLIP's format; a table, or several tables as
            `find_files` takes them.
        columns: what the columns of a table mean.
        format: one of `FORMATS`; None decides by what is there.
        texts: Chinese-CLIP's JSON lines with texts; by default `…_texts.jsonl` beside `…_imgs.tsv`.
        image_root: where relative paths of images in a table count from; the table's folder by default.
        encoding: of CSV tables, as Python names it; None detects it.

    Raises:
        UserError: if nothing is there, or it is of no known kind.
    """
    folder = Path(source).expanduser() if isinstance(source, str) else None
    if format in (None, "chinese_clip") and folder is not None and folder.is_dir():
        source = _find_pair(folder, str(source))
        folder = Path(source).expanduser()
    if format in (None, "folder") and folder is not None and folder.is_dir():
        if format is None and _holds_tars_alone(folder):
            rule = "holds tars already; m2-data check looks at them, m2-data curate chooses"
            raise UserError(rule, key="source", value=source)
        tables = _tables(folder)
        if format == "folder" or not tables or has_pair(folder):  # img2dataset puts its table beside the images
            _refuse_encoding(encoding, "folder")
            return Source("folder", (folder,), None, None, columns, left_out=tables)
    if format == "folder":
        raise UserError("no such folder", key="source", value=source)
    known = [suffix for name, suffixes in _SUFFIXES.items() if format in (None, name) for suffix in suffixes]
    paths = tuple(find_files(source, suffixes=known or [".tsv"], what="table"))
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} does not exist", key="source", value=source)
    kind = format or _kind_of(paths)
    partner = _find_texts(paths, texts) if kind in ("csv", "chinese_clip") else None
    if kind == "chinese_clip" or (format is None and partner is not None):
        if len(paths) != 1 or partner is None or not partner.is_file():
            raise UserError(
                f"source={source}: Chinese-CLIP's format is one file of images and one of texts; "
                "give source=…_imgs.tsv texts=…_texts.jsonl"
            )
        _refuse_encoding(encoding, "chinese_clip")
        return Source("chinese_clip", paths, partner, None, columns)
    if format is None:
        _refuse_lonely_images(paths, source)
    if texts is not None:
        raise UserError(
            f"goes with one .tsv of images in Chinese-CLIP's format; source is {kind}", key="texts", value=texts
        )
    if kind != "csv":
        _refuse_encoding(encoding, kind)
    return Source(kind, paths, None, image_root, columns, encoding)


def _refuse_lonely_images(paths: Sequence[Path], source: str | Sequence[str]) -> None:
    if len(paths) == 1 and paths[0].name.endswith(_IMAGES_ENDING):
        raise UserError(
            f"source={source}: is called like images in Chinese-CLIP's format, and {_texts_name(paths[0])} is not "
            "beside it; name the file of texts with texts=FILE, or say format=csv if its first row names columns"
        )


def _tables(folder: Path) -> tuple[Path, ...]:
    known = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in known and path.name[0] != "."))


def _refuse_encoding(encoding: str | None, kind: str) -> None:
    if encoding is not None:
        rule = f"goes with .csv and .tsv; source is {kind}, which is UTF-8: convert it, as with iconv"
        raise UserError(rule, key="encoding", value=encoding)


def _holds_tars_alone(folder: Path) -> bool:
    suffixes = {path.suffix.lower() for path in folder.iterdir() if path.name[0] != "."}
    return ".tar" in suffixes and not suffixes & set(PICTURE_SUFFIXES)


def _kind_of(paths: Sequence[Path]) -> str:
    suffixes = {path.suffix.lower() for path in paths}
    kinds = [name for name, known in _SUFFIXES.items() if suffixes & set(known)]
    if len(kinds) != 1 or not suffixes <= set(_SUFFIXES[kinds[0]]):
        known = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
        raise UserError(
            f"files end in {', '.join(sorted(suffixes)) or 'nothing'}: give a folder with images "
            f"({', '.join(PICTURE_SUFFIXES)}), or tables of one kind ({known}), or say format={'|'.join(FORMATS)}"
        )
    return kinds[0]


def _find_texts(paths: Sequence[Path], texts: str | None) -> Path | None:
    if texts is not None:
        path = Path(texts).expanduser()
        if not path.is_file():
            raise UserError("no such file", key="texts", value=texts)
        return path
    if len(paths) == 1 and paths[0].name.endswith(_IMAGES_ENDING):
        path = paths[0].with_name(_texts_name(paths[0]))
        return path if path.is_file() else None
    return None


def _texts_name(images: Path) -> str:
    return images.name.removesuffix(_IMAGES_ENDING) + _TEXTS_ENDING


def _find_pair(folder: Path, source: str) -> str:
    """The images of the one pair of files in Chinese-CLIP's format in a folder; the folder if there is none."""
    found = [path for path in sorted(folder.glob(f"*{_IMAGES_ENDING}")) if path.with_name(_texts_name(path)).is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"source={source}: holds several sets of images and texts ({names}); give one, source={found[0]}"
        )
    return str(found[0]) if found else source
