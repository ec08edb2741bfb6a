"""A page that searches pictures in a browser without any server: a folder to open from disk or to put on a static host.

    web/index.html            the page of `m2-serve`, which asks its own scripts in place of a server
    web/data/runtime.js       ONNX Runtime for browsers
    web/data/text.js          the text graph and the tokenizer
    web/data/image.js         the image graph; loaded when somebody searches by a picture
    web/data/pictures.js      names and features
    web/data/thumbnails-*.js  small pictures, loaded as they are shown
    web/licences/             of what is not ours

Browsers let a page that was opened from disk read no other file, but run its scripts: so all data are scripts.

Letters: N pictures · E feature dim.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from m2_encoder.bounds import Text, check_bounds
from m2_encoder.checkpoints.card_words import Words
from m2_encoder.config.paths import find_path
from m2_encoder.data.emoji.drawings import write_drawings
from m2_encoder.data.images.opening import name_format, open_picture, read_picture_file
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import ImageError, Problem, UserError, name_some
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.exports.base import ExportFormat, ExportSource, Features, Measured, compare
from m2_encoder.exports.graphs import Graphs, GraphSettings, graph_bytes, run_graphs
from m2_encoder.exports.onnx_format import NEEDED, make_graphs, missing_extra
from m2_encoder.exports.samples import TEXTS
from m2_encoder.exports.web_runtime import PACKAGE, SCRIPT, WASM, runtime_folder, runtime_rule
from m2_encoder.exports.web_tokenizer import describe_tokenizer
from m2_encoder.files import write_text
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.picture_search.ending import COPY, LIFT, chance_lift
from m2_encoder.picture_search.index import INDEX_FILE, SAMPLE, IndexModel, PictureIndex, open_index
from m2_encoder.picture_search.model import SearchModel, require_same
from m2_encoder.picture_search.thumbnails import DRAWING_PX, make_thumbnail
from m2_encoder.picture_search.update import update_index

FOLDER: Final = "web"
DRAWINGS: Final = "drawings"
"""In place of an index or a folder: the built-in drawings."""

MAX_GRAPH_BYTES: Final = 256 * 2**20
"""Of both graphs: a browser holds the script, what it unpacks to, and what ONNX Runtime makes of that."""

MAX_PICTURES: Final = 50_000
"""All of them are compared with a query, on one core."""

_PACK_BYTES: Final = 2**20
_NAMED: Final = 5  # pictures that could not be read
_THUMBNAIL_PX: Final = 320
_SCRIPTS: Final = ("tokenizer.js", "query.js", "picture.js", "backend.js")
_BACKEND: Final = re.compile(r"<!-- backend -->.*<!-- /backend -->", re.DOTALL)
# The page may load its own scripts and nothing else, and send nothing to anybody.
_POLICY: Final = (
    "default-src 'none'; script-src 'self' file: blob: 'unsafe-inline' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src blob: data:; form-action 'none'; base-uri 'none'"
)
_CALL: Final = re.compile(r"m2data\(\"[\w-]+\",(.*)\);\n", re.DOTALL)
_RUNTIME_LICENCE: Final = f"""{PACKAGE}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


class Web(ExportFormat):
    """`web/`: `index.html` and its data.

    Args:
        pictures: what is searched: "drawings", the built-in ones; an index of `m2-search` that this model made; or a
            folder of pictures, which is indexed. Names, features and small copies go into the page.
    """

    @check_bounds
    def __init__(self, *, pictures: Text = DRAWINGS) -> None:
        self.pictures = pictures

    def problems(self, config: M2EncoderConfig) -> Iterator[Problem]:
        """As the base class says."""
        yield from missing_extra(NEEDED)
        if self.pictures != DRAWINGS and not find_path(self.pictures).is_dir():
            fix = f"give an index of m2-search, a folder of pictures, or {DRAWINGS}"
            yield Problem("pictures", self.pictures, "no such folder", fix)
        if rule := runtime_rule(runtime_folder()):
            fix = "fetch it once with python -m m2_encoder.exports.web_runtime, which needs npm and the network"
            yield Problem("", str(runtime_folder()), rule, fix)
        size = sum(graph_bytes(config, bytes_per_value=4).values())
        if size > MAX_GRAPH_BYTES:
            rule = f"graphs of {size / 2**20:,.0f} MiB; a page holds {MAX_GRAPH_BYTES // 2**20} MiB at most"
            yield Problem("", config.name, rule, "use m2-serve, or export a smaller model")

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        home = folder / FOLDER
        (home / "data").mkdir(parents=True)
        recipe, characters = describe_tokenizer(source.tokenizer)
        index = self._open(folder.parent / "pictures", source)
        settings = GraphSettings(torch.float32, source.tokenizer.context_length, False)
        graphs = make_graphs(folder.parent, source, settings)
        runtime = runtime_folder()
        script, wasm = (runtime / SCRIPT).read_text(encoding="utf-8"), (runtime / WASM).read_bytes()
        _write_data(home, "runtime", {"script": script, "wasm": _pack(wasm)})
        text = {"graph": _pack(graphs.text.read_bytes()), "tokenizer": recipe, "characters": _pack(characters)}
        _write_data(home, "text", text)
        image = {
            "graph": _pack(graphs.image.read_bytes()),
            "side": source.model.config.image_size,
            "policy": source.loaded.preprocess.pictures.to_dict(),
        }
        _write_data(home, "image", image)
        self._write_pictures(home, index)
        write_text(home / "index.html", _page())
        self._write_licences(home / "licences")

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says: graphs and features are read back out of the scripts."""
        home = folder / FOLDER
        with tempfile.TemporaryDirectory() as scratch:
            graphs = Graphs(Path(scratch) / "image.onnx", Path(scratch) / "text.onnx")
            for path in graphs:
                path.write_bytes(_unpack(read_data(home, path.stem)["graph"]))
            ids, mask = source.tokenizer(TEXTS)
            rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
            run = run_graphs(graphs, pixels=source.pixels, rows=rows)
        ours = Features(source.image_features, source.text_features(TEXTS))
        return Measured(*compare(ours, run.features), run.image_ms, run.text_ms, run.peak_bytes, _describe(home))

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        return (
            f"双击 `{FOLDER}/index.html`，或把整个文件夹放到任何静态网站上；不需要服务器，也不联网。\n\n"
            f"Open `{FOLDER}/index.html` from disk, or put the whole folder on any static host. It needs no server, "
            "and asks nothing of other machines. It holds names and small copies of the pictures."
        )

    def _open(self, scratch: Path, source: ExportSource) -> PictureIndex:
        """The index of the pictures; of a folder it is made beside."""
        model = _search_model(source)
        place = find_path(self.pictures)
        if self.pictures != DRAWINGS and (place / INDEX_FILE).is_file():
            index = open_index(place)
            require_same(index, model.made_by)
        else:
            root = write_drawings(scratch) if self.pictures == DRAWINGS else place
            update_index(scratch.with_suffix(".index"), root, model, neighbours=False)
            index = open_index(scratch.with_suffix(".index"))
        if len(index) > MAX_PICTURES:
            rule = f"has {len(index):,} pictures, a page searches {MAX_PICTURES:,} at most; use m2-serve"
            raise UserError(rule, key="pictures", value=self.pictures)
        return index

    def _write_pictures(self, home: Path, index: PictureIndex) -> None:
        """`pictures.js` and all thumbnails, those of neighbouring names together."""
        firsts: list[int] = []
        for first, pack in _packs(index):
            bytes_ = base64.b64encode(b"".join(pack)).decode("ascii")
            _write_data(home, f"thumbnails-{len(firsts)}", {"sizes": [len(each) for each in pack], "bytes": bytes_})
            firsts.append(first)
        features = np.ascontiguousarray(index.features, dtype="<f2")
        content: dict[str, Any] = {
            "names": index.names,
            "features": base64.b64encode(features.tobytes()).decode("ascii"),
            "packs": firsts,
            "ending": {"copy": COPY, "lift": LIFT, "chance": chance_lift(len(index)), "step": -(-len(index) // SAMPLE)},
            "suffixes": PICTURE_SUFFIXES,
            "skipped": [each.name for each in index.skipped],
        }
        _write_data(home, "pictures", content)

    def _write_licences(self, folder: Path) -> None:
        folder.mkdir()
        write_text(folder / "onnxruntime-web.txt", _RUNTIME_LICENCE)
        if self.pictures == DRAWINGS:
            emoji = files("m2_encoder") / "assets" / "emoji"
            (folder / "drawings.md").write_bytes((emoji / "ATTRIBUTION.md").read_bytes())
            (folder / "licenses").mkdir()
            for file in (emoji / "licenses").iterdir():
                (folder / "licenses" / file.name).write_bytes(file.read_bytes())


def read_data(home: Path, name: str) -> Any:
    """What a script of `data/` gives to the page."""
    found = _CALL.fullmatch((home / "data" / f"{name}.js").read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{home}: data/{name}.js is damaged")
    return json.loads(found[1])


def _write_data(home: Path, name: str, content: Mapping[str, Any]) -> None:
    written = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    write_text(home / "data" / f"{name}.js", f'm2data("{name}",{written});\n')


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _unpack(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def _page() -> str:
    """The page of `m2-serve` with other scripts in place of those that ask it."""
    assets = files("m2_encoder") / "assets"
    page = (assets / "serving" / "search.html").read_text(encoding="utf-8")
    scripts = [(assets / "web" / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    own = "".join(f"<script>\n{script}</script>\n" for script in scripts)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    page, replaced = _BACKEND.subn(lambda _: own, page)
    assert replaced == 1, "search.html has no part to replace"
    return page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}', 1)


def _search_model(source: ExportSource) -> SearchModel:
    loaded = source.loaded
    encoder = wrap_towers(loaded.model, loaded.preprocess, source.tokenizer, name=source.model.config.name)
    made_by = IndexModel(encoder.name, None, None, loaded.preprocess.pictures.to_setting(), encoder.fingerprint)
    return SearchModel(encoder, made_by)


def _packs(index: PictureIndex) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Thumbnails of all pictures in packs of about a megabyte, each with its first row."""
    first, pack = 0, list[bytes]()
    for row, name in enumerate(index.names):
        pack.append(_thumbnail(index.root / name))
        if sum(map(len, pack)) >= _PACK_BYTES:
            yield first, pack
            first, pack = row + 1, []
    if pack:
        yield first, pack


def _thumbnail(path: Path) -> bytes:
    """A picture as the page shows it: a small WebP as it is; nothing of one that cannot be read any more."""
    try:
        content = read_picture_file(path)
        if name_format(content) == "WEBP":
            with open_picture(content) as image:
                if max(image.size) <= DRAWING_PX:
                    return content
        return make_thumbnail(content, _THUMBNAIL_PX)
    except ImageError:
        return b""


def _describe(home: Path) -> list[Words]:
    """What a browser loads, and when; and what is not in the page."""

    def megabytes(*patterns: str) -> str:
        return f"{sum(path.stat().st_size for each in patterns for path in home.glob(each)) / 1e6:.1f} MB"

    found = read_data(home, "pictures")
    number, page = f"{len(found['names']):,}", megabytes("index.html", "data/pictures.js")
    text, image = megabytes("data/runtime.js", "data/text.js"), megabytes("data/image.js")
    small = megabytes("data/thumbnails-*.js")
    notes = [
        Words(
            f"{number} pictures; a browser loads {page} at once, {text} with the first words, {image} with the first "
            f"picture, and up to {small} of small pictures as they are shown",
            f"{number} 张图片；浏览器一开始加载 {page}，首次输入文字时加载 {text}，首次用图片搜索时加载 {image}，"
            f"小图随显示加载，至多 {small}",
        )
    ]
    if skipped := found["skipped"]:
        shown = ", ".join(skipped[:_NAMED])
        more = len(skipped) - _NAMED
        notes.append(
            Words(
                f"left out, because they cannot be read: {name_some(skipped, _NAMED)}",
                f"无法读取，未收入：{shown}" + (f"，另有 {more} 张" if more > 0 else ""),
            )
        )
    return notes
