"""The page without a server in a real browser, opened from disk: what people do, and what goes wrong."""

from __future__ import annotations

import base64
import json
import math
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from m2_encoder.data.images.transforms import MAX_PIXELS
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.exports.web_format import Web
from m2_encoder.exports.writing import write_export
from m2_encoder.picture_search.query import encode_query, parse_query
from m2_encoder.picture_search.results import Results, find_results, read_picture
from tests.support.browser import Tab, chromium
from tests.support.web_page import NUMBER, WebPage, need_web, web_source, write_web_page

pytestmark = pytest.mark.slow

TILES = "[...document.querySelectorAll('.tile')]"
NAMES = f"{TILES}.map(tile => tile.getAttribute('aria-label'))"
SHOWN = "document.querySelectorAll('.tile img.shown').length"
STATUS = "document.getElementById('status').textContent"
BANNER = "document.getElementById('banner').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> WebPage:
    need_web()
    return write_web_page(tmp_path_factory.mktemp("web") / "a folder, 文件夹")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, page: WebPage) -> Iterator[Tab]:
    """The page, just opened from disk; no test may ask anything of other machines, or leave an error."""
    browser.requested.clear()
    browser.complaints.clear()
    browser.open()
    browser.go((page.home / "index.html").as_uri())
    browser.wait(f"{SHOWN} > 3")
    yield browser
    own = (page.home.as_uri() + "/", "data:", "blob:null/")
    assert all(each.startswith(own) for each in browser.requested), browser.requested
    assert browser.complaints == []
    browser.call("Page.close")


def _search(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('query').focus(); document.getElementById('query').select()")
    tab.type(text)
    tab.press("Enter")
    tab.wait(f"location.hash === '#q=' + encodeURIComponent({json.dumps(text)}) && !document.body.matches('.busy')")


def _expected(page: WebPage, query: str) -> Results:
    terms = parse_query(query, is_picture=page.index.rows.__contains__)
    feature = encode_query(terms, page.model.encoder, picture=lambda name: read_picture(page.index, name))
    own = [page.index.rows[term.content] for term in terms if term.kind == "picture"]
    return find_results(page.index, feature, NUMBER, query=query, without=own)


@pytest.mark.parametrize("query", ["红色的水果", "a dog on the beach", '2*"狗" + town/004.png - "fruit"'])
def test_words_find_what_picture_search_finds(tab: Tab, page: WebPage, query: str) -> None:
    _search(tab, query)
    expected = _expected(page, query)
    tab.wait(f"{NAMES}[0] === {json.dumps(expected.rows[0].name)}")
    shown = tab.run(f"backend.find({json.dumps({'text': query})}, 0, {NUMBER})")
    scores = {row.name: row.score for row in expected.rows}
    ours = [scores[each["name"]] for each in shown["results"]]
    np.testing.assert_allclose([each["score"] for each in shown["results"]], ours, atol=2e-6)
    np.testing.assert_allclose(ours, [row.score for row in expected.rows], atol=2e-6)
    assert shown["end"] == expected.end
    assert f"{expected.end} probably match" in tab.run(STATUS)
    if expected.end < 100:
        assert tab.run("[...document.getElementById('grid').children].findIndex(each => each.matches('.end'))") == (
            expected.end
        )


def test_the_browser_computes_our_features(tab: Tab, page: WebPage) -> None:
    script = f"Promise.all({json.dumps(TEXTS)}.map(async text => [...await encodeText(text)]))"
    found = np.array(tab.run(script))
    np.testing.assert_allclose(found, page.source.text_features(TEXTS).numpy(), atol=1e-5)


def test_an_empty_query_shows_all_pictures_again(tab: Tab, page: WebPage) -> None:
    _search(tab, "cat")
    tab.wait("document.getElementById('intro').hidden")
    tab.run("document.getElementById('query').value = '   '")
    tab.press("Enter")
    tab.wait(f"{NAMES}[0] === {json.dumps(page.index.names[0])} && {STATUS} === 'All {NUMBER} pictures'")
    assert not any("runtime" in each for each in tab.requested[:3]), "all pictures are shown without a model"
    assert tab.run("document.getElementById('banner').hidden")


def test_similar_pictures_and_back(tab: Tab, page: WebPage) -> None:
    name = page.index.names[7]
    row = page.index.rows[name]
    feature = np.asarray(page.index.features[row], np.float32)
    similar = find_results(page.index, feature, 9, query="", without=(row,))
    tab.run(f"{TILES}[7].click()")
    tab.wait("document.getElementById('viewer').open && document.getElementById('large').naturalWidth === 320")
    assert tab.run("document.getElementById('original').hidden"), "there are only small copies"
    tab.press("s")
    tab.wait(f"{NAMES}[0] === {json.dumps(similar.rows[0].name)} && !document.getElementById('chip').hidden")
    assert set(tab.run(NAMES)[:9]) == {each.name for each in similar.rows}
    assert not any("runtime" in each for each in tab.requested), "no model is needed for that"
    tab.run("history.back()")
    tab.wait(f"{NAMES}[0] === {json.dumps(page.index.names[0])}")


def test_pictures_that_are_too_large_are_refused(tab: Tab) -> None:
    code = "encodePicture({}).then(() => 'read', error => error.code)"
    assert tab.run(code.format("new File([new Uint8Array(32 * 2 ** 20 + 1)], 'x')")) == "too_large"
    assert tab.run(code.format("new File(['none'], 'x')")) == "no_picture"
    side = math.isqrt(MAX_PIXELS) + 1
    tab.run(f"window.createImageBitmap = async () => ({{ width: {side}, height: {side} }})")
    assert tab.run(code.format("new File(['none'], 'x')")) == "too_large"


def test_a_picture_is_found_by_its_name(tab: Tab, page: WebPage) -> None:
    name = page.index.names[3]
    found = tab.run(f"backend.find({{text: {json.dumps(name)}}}, 0, 3)")
    expected = _expected(page, name)
    assert [each["name"] for each in found["results"]] == [each.name for each in expected.rows[:3]]
    assert (found["total"], found["end"]) == (NUMBER - 1, expected.end)


def _file_of(content: bytes) -> str:
    text = base64.b64encode(content).decode()
    return f"new File([Uint8Array.from(atob('{text}'), sign => sign.charCodeAt(0))], 'x', {{type: 'image/png'}})"


def test_a_dropped_picture_finds_itself(tab: Tab, page: WebPage) -> None:
    name = page.index.names[9]
    content = (page.index.root / name).read_bytes()
    made = f"const data = new DataTransfer(); data.items.add({_file_of(content)});"
    event = "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})"
    tab.run(f"{{ {made} document.dispatchEvent({event}); }}")
    tab.wait(f"{NAMES}[0] === {json.dumps(name)} && !document.getElementById('chip').hidden")
    feature = np.array(tab.run("encodePicture(state.picture.file).then(found => [...found])"))
    np.testing.assert_allclose(feature, page.index.features[page.index.rows[name]], atol=1e-3)


def test_files_of_all_kinds_get_nearly_our_features(tab: Tab, page: WebPage) -> None:
    """Decoded by the browser: alpha, palettes, grey, 16 bits, CMYK, EXIF, 1 to 1,200 pixels."""
    for picture, ours in zip(make_pictures(), page.source.image_features, strict=True):
        found = tab.run(f"encodePicture({_file_of(picture.content)}).then(found => [...found])")
        assert np.dot(found, ours.numpy()) > 0.999, picture.name


def test_what_cannot_be_searched_is_said(tab: Tab) -> None:
    tab.run(f"usePicture({_file_of(b'broken')})")
    tab.wait(f"{BANNER}.includes('no picture that can be read')")
    _search(tab, "gone.jpg")
    tab.wait(f"{BANNER}.includes('The index has no such picture')")
    _search(tab, '"a" - dog')
    tab.wait(f"{BANNER}.includes('cannot be read from - dog on')")
    _search(tab, '"a" - "a"')
    tab.wait(f"{BANNER}.includes('cancel each other')")
    _search(tab, "cat")
    tab.wait("document.getElementById('banner').hidden")


def test_the_page_may_ask_nobody(tab: Tab) -> None:
    tab.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    refused = [each for each in tab.complaints if "Content Security Policy" in each]
    assert refused
    assert len(refused) == len(tab.complaints)
    assert not any("127.0.0.1" in each for each in tab.requested)
    tab.complaints.clear()


@pytest.mark.parametrize("lost", ["pictures", "text", "runtime", "thumbnails-0"])
def test_a_lost_file_is_said(browser: Tab, page: WebPage, lost: str, tmp_path: Path) -> None:
    home = Path(shutil.copytree(page.home, tmp_path / "copy"))
    (home / "data" / f"{lost}.js").unlink()
    browser.open()
    browser.go((home / "index.html").as_uri())
    if lost == "thumbnails-0":
        browser.wait("document.querySelector('.tile.broken') !== null")
        assert browser.run(NAMES)[0] == page.index.names[0]
    else:
        browser.run("document.getElementById('query').focus()")
        browser.type("cat")
        browser.wait(f"{BANNER}.includes('A file of the folder data is missing')")
    if lost == "text":
        shutil.copyfile(page.home / "data" / "text.js", home / "data" / "text.js")
        browser.press("Enter")
        browser.wait(f"{STATUS}.includes('probably match')")
    browser.call("Page.close")


def test_any_static_host_serves_it(browser: Tab, page: WebPage) -> None:
    handler = partial(_Quiet, directory=str(page.home))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open()
        browser.go(f"http://127.0.0.1:{server.server_port}/index.html")
        browser.wait(f"{SHOWN} > 3")
        _search(browser, "cat")
        browser.wait(f"{NAMES}[0] === {json.dumps(_expected(page, 'cat').rows[0].name)}")
        browser.call("Page.close")
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_the_built_in_drawings(browser: Tab, tmp_path: Path) -> None:
    need_web()
    write_export(tmp_path / "export", source=web_source(), formats={"web": Web()})
    home = tmp_path / "export" / "web"
    assert (home / "licences" / "drawings.md").is_file()
    assert len([*(home / "licences" / "licenses").iterdir()]) >= 4
    assert sum(path.stat().st_size for path in home.rglob("*")) < 30e6
    browser.open()
    browser.go((home / "index.html").as_uri())
    browser.wait(f"{SHOWN} > 3 && {STATUS} === 'All 7,074 pictures'")
    _search(browser, "红苹果")
    browser.wait(f"{STATUS}.includes('7,074 in all')")
    browser.call("Page.close")
