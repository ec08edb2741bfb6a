"""The page without a server: what is written, and its scripts in node, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2_encoder.data.emoji.dataset import load_emoji_concepts, load_emoji_tokenizer_model
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import Problem, UserError
from m2_encoder.exports import web_format, web_runtime
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.samples import TEXTS
from m2_encoder.exports.web_format import Web, read_data
from m2_encoder.exports.web_tokenizer import describe_tokenizer
from m2_encoder.exports.writing import write_export
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.picture_search.query import parse_query
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.javascript import run_scripts
from tests.support.web_page import NUMBER, WebPage, need_web, web_source, write_web_page

ODD_TEXTS = [
    "", "  ", "red<|endoftext|>apple", "a [MASK] b[UNK] c", "[SEP] [sep]", "\r\n\r\n", "a\tb\n\nc\x1c\x85d", "<0x41>",
    "A\u200bB", "ＡＢＣ①②㌔ﬁ", "👩\u200d🚀 a\u200db", "zzzzz", "<|blank_3|>", "é e\u0301 ß İ",
    "\ufeffa\u00a0b", "\ud800x",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> WebPage:
    need_web()
    return write_web_page(tmp_path_factory.mktemp("web"))


def _own_texts() -> list[str]:
    """The samples, oddities, captions, and nonsense of all scripts."""
    rng = random.Random(0)
    letters = [chr(code) for code in (*range(1, 0x3000), *range(0xF900, 0xFDD0), *range(0xFDF0, 0x10000))]
    nonsense = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(1500)]
    captions = [text for concept in load_emoji_concepts()[::4] for each in concept.captions.values()
                for text in each.texts()]  # fmt: skip
    return [*TEXTS, *ODD_TEXTS, *captions, *nonsense]


@pytest.mark.parametrize(("length", "side"), [(24, "left"), (6, "right")])
def test_texts_get_the_same_ids_in_javascript(length: int, side: Any, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=length, truncation_side=side)
    recipe, characters = describe_tokenizer(tokenizer)
    texts = _own_texts()
    values = {"recipe": recipe, "characters": base64.b64encode(characters).decode(), "texts": texts}
    made = "new Tokenizer(values.recipe, new Uint8Array(Buffer.from(values.characters, 'base64')))"
    expression = f"(tokenizer => values.texts.map(text => tokenizer.encode(text)))({made})"
    found = run_scripts(["tokenizer.js"], expression, values, tmp_path)
    for text, ids in zip(texts, found, strict=True):
        (expected,), (mask,) = tokenizer(text)
        assert ids == expected[mask].tolist(), repr(text)


def test_a_tokenizer_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, source: ExportSource) -> None:
    from m2_encoder.exports import web_tokenizer

    whole = web_tokenizer.read_specification(source.tokenizer.model_bytes)
    monkeypatch.setattr(web_tokenizer, "read_specification", lambda _: whole._replace(algorithm="bpe"))
    with pytest.raises(UserError, match="kind bpe; the page reads the kind unigram"):
        describe_tokenizer(source.tokenizer)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 40), (300, 200), (90, 16), (33, 47)])
def test_pictures_are_resized_as_pillow_does_it(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    expression = f"[...resize(Uint8Array.from(values), {size[0]}, {size[1]}, 16)]"
    found = run_scripts(["picture.js"], expression, pixels.ravel().tolist(), tmp_path)
    assert found == expected.ravel().tolist()


def test_queries_are_read_alike(tmp_path: Path) -> None:
    queries = [
        "红色的水果", "New York - skyline", "a.jpg", "海 & beach/001.PNG", '2*"狗" + pool.jpg - "水果"',
        '"a" + "b"', "“甲” - 「乙」",
        '-"a" + .5 × b.png', '"pool.jpg"', "a.jpg b.png", '"a', ' "a" ', "1.5*a.webp", '"a" - dog', '0*"a"', '101*"a"',
        '"" + "a"', "+".join(['"a"'] * 17), "a\nb.jpg", "-a.jpg", "x*y", '3*"a"-b.gif+"c"',
        '2*"狗', "2*狗 + 水果", '2＊"狗" － "水果"＋a.jpg', '"红色" "水果"', '0.0001*"a', "C++", "T-shirt",
        '"a" b', 'a.jpg + "b', "长" * 4096, "😀" * 4097,
        "２*\"a\"", "2*x.png", "holiday.jpg-1.png", ' 中文/红 苹果 - "引号".png',
    ]  # fmt: skip

    names = ["2*x.png", "holiday.jpg-1.png", '中文/红 苹果 - "引号".png']

    def read(query: str) -> list[list[Any]] | str:
        try:
            terms = parse_query(query, is_picture=names.__contains__)
            return [[term.weight, term.kind, term.content] for term in terms]
        except UserError:
            return "invalid"

    expression = (
        "values.queries.map(query => { try { return parseQuery(query, values.suffixes,"
        " name => values.names.includes(name))"
        ".map(term => [term.weight, term.kind, term.content]); } catch (error) { return error.code; } })"
    )
    values = {"queries": queries, "suffixes": PICTURE_SUFFIXES, "names": names}
    found = run_scripts(["query.js"], expression, values, tmp_path)
    assert dict(zip(queries, found, strict=True)) == {query: read(query) for query in queries}


def test_the_folder_is_whole_in_itself(page: WebPage) -> None:
    (result,) = page.parity.results
    assert result.measured.smallest_cosine >= 0.99999
    assert f"{NUMBER} pictures; a browser loads" in result.measured.notes[0].en
    assert result.measured.notes[1].en == "left out, because they cannot be read: broken.png"
    html = (page.home / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert "/api/" not in html
    assert re.findall(r"https?://[^'\s]+", html) == ["http://www.w3.org/2000/svg"], "nothing comes from elsewhere"
    found = read_data(page.home, "pictures")
    assert found["names"] == page.index.names
    features = np.frombuffer(base64.b64decode(found["features"]), np.float16).reshape(NUMBER, -1)
    np.testing.assert_array_equal(features, page.index.features)
    thumbnails = [_thumbnails(page.home, number) for number in range(len(found["packs"]))]
    assert sum(map(len, thumbnails)) == NUMBER
    with Image.open(io.BytesIO(thumbnails[0][0])) as image:
        assert image.size == (320, 160)
    assert {path.name for path in (page.home / "licences").iterdir()} == {"onnxruntime-web.txt"}


def _thumbnails(home: Path, number: int) -> list[bytes]:
    pack = read_data(home, f"thumbnails-{number}")
    ends = np.cumsum(pack["sizes"])
    return [base64.b64decode(pack["bytes"])[end - size : end] for end, size in zip(ends, pack["sizes"], strict=True)]


def test_thumbnails_are_packed_and_lost_files_keep_their_place(
    page: WebPage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(web_format, "_PACK_BYTES", 40_000)
    for name in page.index.names[1:]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((page.index.root / name).read_bytes())
    packs = [*web_format._packs(dataclasses.replace(page.index, root=tmp_path))]
    assert len(packs) > 2
    assert packs[0][1][0] == b""
    assert [first for first, _ in packs] == [
        sum(len(pack) for _, pack in packs[:number]) for number in range(len(packs))
    ]
    assert sum(len(pack) for _, pack in packs) == NUMBER


def test_an_index_of_another_model_is_refused(page: WebPage, tmp_path: Path) -> None:
    other = web_source(context_length=13)
    web = Web(pictures=str(page.index.path))
    with pytest.raises(UserError, match="is not the model of"):
        write_export(tmp_path / "out", source=other, formats={"web": web})
    assert not (tmp_path / "out").exists()


def _problems(web: Web, name: str = "tiny") -> list[Problem]:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    return [*web.problems(NAME_TO_CONFIG[name])]


def test_what_is_missing_is_known_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path))
    folder, runtime, large = _problems(Web(pictures=str(tmp_path / "no")), "m2-encoder-0.4b")
    assert folder.key == "pictures"
    assert "onnxruntime-web@" in runtime.rule
    assert "python -m m2_encoder.exports.web_runtime" in (runtime.fix or "")
    assert "a page holds 256 MiB at most" in large.rule
    assert "use m2-serve" in (large.fix or "")


OTHER_FILES = """
mkdir -p package/dist
echo x > package/dist/ort.wasm.bundle.min.mjs
echo x > package/dist/ort-wasm-simd-threaded.wasm
tar czf onnxruntime-web-1.30.0.tgz package
"""


@pytest.mark.parametrize(
    ("npm", "rule"),
    [
        (None, "npm is not installed"),
        ("echo npm error network is unreachable >&2; exit 1", "failed: npm error network is unreachable"),
        (OTHER_FILES, "is not that of onnxruntime-web@"),
    ],
)
def test_fetching_fails_in_one_line(
    npm: str | None, rule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path / "cache"))
    programs = tmp_path / "bin"
    programs.mkdir()
    if npm is not None:
        (programs / "npm").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{npm}\n")
        (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert web_runtime.main() == 2
    said = capsys.readouterr().err
    assert rule in said
    assert said.count("\n") == 1
    assert not web_runtime.runtime_folder().exists()
