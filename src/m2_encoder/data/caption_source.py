"""Captions of any source, without its pictures: tars, tables, folders and text files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from m2_encoder.data.packing.records import Columns, Record
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.samples.parse import Captions, CaptionText, SampleProblem, decode_text, gather, parse_sample_text
from m2_encoder.data.shards.paths import find_files, list_shards
from m2_encoder.data.shards.reader import OpenShard
from m2_encoder.errors import UserError

_TEXT_SUFFIXES = (".txt",)
_ROWS_AT_A_TIME = 1000


class CaptionSource:
    """Reads captions; counts what cannot be used.

    Attributes:
        left_out: captions that are neither Chinese nor English, by language.
        unusable: samples, rows or files without a usable caption, by reason.
    """

    def __init__(self, source: str | Sequence[str], *, language: str | None = None) -> None:
        self._source, self._language = source, language
        self.left_out: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()

    def read(self) -> Iterator[CaptionText]:
        """All captions, in the order of the source.

        Tars (`*.tar`), text files with a caption a line (`*.txt`), or whatever `m2-data pack` takes.

        Raises:
            UserError: if the source is not there, or of no known kind.
        """
        for found in self._find():
            self.left_out.update(caption.language for caption in found.left_out)
            yield from found.kept

    def check(self) -> None:
        """Raise the `UserError` of a source that is not there or of no known kind; looks at names of files."""
        if not self._suffixes() & {".tar", ".txt"}:
            find_source(self._source, columns=Columns())

    def _find(self) -> Iterator[Captions]:
        suffixes = self._suffixes()
        if suffixes == {".tar"}:
            return self._read_tars()
        if suffixes == set(_TEXT_SUFFIXES):
            return self._read_texts()
        return self._read_records()

    def _suffixes(self) -> set[str]:
        parts = [self._source] if isinstance(self._source, str) else list(self._source)
        found = set()
        for part in map(Path, parts):
            names = [path for path in part.iterdir() if path.is_file()] if part.expanduser().is_dir() else [part]
            suffixes = {path.suffix.lower() for path in names if not path.name.startswith(".")}
            # A folder of texts without pictures, or of tars with their indices.
            found |= {".tar"} if ".tar" in suffixes else suffixes
        return found

    def _read_tars(self) -> Iterator[Captions]:
        for path in list_shards(self._source, refuse_urls="captions are read from local files; download the shards"):
            try:
                opened = OpenShard(path, write_index=False)
            except (SampleProblem, OSError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from error
            with closing(opened) as shard:
                self.unusable.update(fault.reason for fault in shard.index.faults)
                yield from filter(None, (self._read_sample(shard, number) for number in range(len(shard.index))))

    def _read_sample(self, shard: OpenShard, number: int) -> Captions | None:
        try:
            raw = shard.read(number)
            said = parse_sample_text(raw.json, raw.text, language=self._language)
        except SampleProblem as problem:
            self._note(problem.reason, problem.left_out)
            return None
        return Captions(said.captions, said.left_out)

    def _read_texts(self) -> Iterator[Captions]:
        for path in find_files(self._source, suffixes=_TEXT_SUFFIXES, what="text"):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            with path.open("rb") as file:
                yield from filter(None, (self._read_line(line, path.name) for line in file))

    def _read_line(self, line: bytes, name: str) -> Captions | None:
        try:
            return gather([(decode_text(line, name), self._language, None)], name)
        except SampleProblem as problem:
            self._note(problem.reason, ())
            return None

    def _read_records(self) -> Iterator[Captions]:
        source = find_source(self._source, columns=Columns(default_language=self._language))
        for part in source.slices(_ROWS_AT_A_TIME):
            for record in part.read():
                if isinstance(record, Record):
                    yield Captions(record.captions, record.left_out)
                else:
                    self.unusable[record.reason] += 1
                    self.left_out.update(record.languages)

    def _note(self, reason: str, left_out: Iterable[CaptionText]) -> None:
        self.unusable[reason] += 1
        self.left_out.update(caption.language for caption in left_out)
