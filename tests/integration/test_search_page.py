"""The search page in a real browser: what people do, and what goes wrong."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from starlette.applications import Starlette

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.serving.app import ServerLimits, build_app
from tests.support.browser import Tab, chromium
from tests.support.serving import Client, encode_files, index_in_memory, running, small_model, write_picture

pytestmark = pytest.mark.slow

TILES = "[...document.querySelectorAll('.tile')]"
NAMES = f"{TILES}.map(tile => tile.getAttribute('aria-label'))"
SHOWN = "document.querySelectorAll('.tile img.shown').length"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    return small_model()


@pytest.fixture(scope="module")
def index(model: EvaluatedModel, tmp_path_factory: pytest.TempPathFactory) -> PictureIndex:
    """Ten thousand names of thirty-two pictures, one of which is broken."""
    root = tmp_path_factory.mktemp("photos")
    first = [f"{seed:05}.png" for seed in range(32)]
    for seed, name in enumerate(first):
        write_picture(root / name, seed, size=(300, 200))
    features = encode_files(root, first, model)
    names = [f"{number:05}.png" for number in range(10_000)]
    for number in range(32, 10_000):
        os.link(root / f"{number % 31:05}.png", root / names[number])
    (root / names[31]).write_bytes(b"broken")
    noise = np.random.default_rng(0).normal(scale=0.05, size=(10_000, 16))
    noise[:32] = 0
    near = features[np.arange(10_000) % 32] + noise
    return index_in_memory(root, names, (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32))


@pytest.fixture(scope="module")
def build(model: EvaluatedModel, index: PictureIndex) -> Callable[[], Starlette]:
    def build() -> Starlette:
        return build_app(model, index=index, api_key=None, only_loopback=True, limits=ServerLimits())

    return build


@pytest.fixture(scope="module")
def server(build: Callable[[], Starlette]) -> Iterator[Client]:
    with running(build()) as client:
        yield client


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, server: Client) -> Iterator[Tab]:
    """The page, just opened, in English; no test may ask anything of other machines, or leave an error."""
    browser.requested.clear()
    browser.complaints.clear()
    browser.open()
    browser.go(server.url)
    browser.wait(f"{SHOWN} > 3")
    yield browser
    assert all(each.startswith((server.url, "data:", "blob:")) for each in browser.requested), browser.requested
    assert browser.complaints == []
    browser.call("Page.close")


def _search(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('query').focus(); document.getElementById('query').select()")
    tab.type(text)
    tab.press("Enter")
    tab.wait(f"location.hash === '#q=' + encodeURIComponent({json.dumps(text)}) && !document.body.matches('.busy')")


def _expected(client: Client, query: str, count: int = 20) -> list[str]:
    return [each["name"] for each in client.post("/api/search", {"query": query, "count": count}).json["results"]]


@pytest.mark.parametrize("query", ["红色的水果", "a dog on the beach"])
def test_words_find_what_the_interface_finds(tab: Tab, server: Client, query: str) -> None:
    _search(tab, query)
    tab.wait(f"{NAMES}[0] === {json.dumps(_expected(server, query)[0])}")
    assert tab.run(NAMES)[:20] == _expected(server, query)
    end = server.post("/api/search", {"query": query}).json["end"]
    assert f"{end:,} probably match" in tab.run(STATUS)
    tab.wait(f"{TILES}.length > {min(end, 100)}")
    if end < 100:
        before = "[...document.querySelector('.end').parentNode.children].indexOf(document.querySelector('.end'))"
        assert tab.run(before) == end
        if end:  # where nothing fits, nothing is paler than the rest
            assert tab.run("document.querySelectorAll('.tile:not(.after)').length") == end


def test_results_come_while_one_types_but_not_while_one_composes(tab: Tab, server: Client) -> None:
    tab.run("document.getElementById('query').focus()")
    tab.type("cat")
    tab.wait(f"{NAMES}[0] === {json.dumps(_expected(server, 'cat')[0])}")
    asked = len([each for each in tab.requested if each.endswith("/api/search")])
    tab.call("Input.imeSetComposition", text="mao", selectionStart=3, selectionEnd=3)
    tab.run("new Promise(done => setTimeout(done, 500))")
    assert len([each for each in tab.requested if each.endswith("/api/search")]) == asked
    tab.type("猫")
    tab.wait(f"{NAMES}[0] === {json.dumps(_expected(server, 'cat猫')[0])}")


def test_an_empty_query_shows_all_pictures_again(tab: Tab) -> None:
    assert "All 10,000 pictures" in tab.run(STATUS)
    assert tab.run(NAMES)[:3] == ["00000.png", "00001.png", "00002.png"]
    _search(tab, "cat")
    tab.wait("document.getElementById('intro').hidden")
    tab.run("document.getElementById('query').value = '   '")
    tab.press("Enter")
    tab.wait(f"{NAMES}[0] === '00000.png' && !document.getElementById('intro').hidden")
    assert tab.run("document.getElementById('banner').hidden")


def _file_of(path: Path, kind: str = "image/png") -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"new File([Uint8Array.from(atob('{content}'), sign => sign.charCodeAt(0))], 'x', {{type: '{kind}'}})"


@pytest.mark.parametrize("way", ["drop", "paste", "button"])
def test_a_picture_finds_itself(tab: Tab, index: PictureIndex, way: str) -> None:
    path = index.root / "00005.png"
    if way == "button":
        document = tab.call("DOM.getDocument")["root"]["nodeId"]
        node = tab.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        tab.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)
    else:
        made = f"const data = new DataTransfer(); data.items.add({_file_of(path)});"
        event = (
            "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})"
            if way == "paste"
            else "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})"
        )
        if way == "drop":
            tab.run(f"{{ {made} document.dispatchEvent(new DragEvent('dragenter', {{dataTransfer: data}})); }}")
            tab.wait("!document.getElementById('drop').hidden")
        tab.run(f"{{ {made} document.dispatchEvent({event}); }}")
    tab.wait(f"!document.getElementById('chip').hidden && {NAMES}[0] === '00005.png'")
    assert tab.run("document.getElementById('drop').hidden")
    tab.run("document.getElementById('unpick').click()")
    tab.wait(f"{NAMES}[0] === '00000.png' && document.getElementById('chip').hidden")


def test_a_picture_and_words_together(tab: Tab, index: PictureIndex, server: Client) -> None:
    path = index.root / "00005.png"
    tab.run(f"usePicture({_file_of(path)})")
    tab.wait(f"{NAMES}[0] === '00005.png'")
    tab.run("document.getElementById('query').focus()")
    tab.type("水果")
    both = server.send_form("/api/search", {"image": path.read_bytes(), "query": "水果"}).json["results"]
    tab.wait(f"{NAMES}.slice(0, 9).join() === '{','.join(each['name'] for each in both[:9])}'")


def test_what_is_no_picture_is_said_and_left_out(tab: Tab, index: PictureIndex) -> None:
    tab.run(f"usePicture({_file_of(index.root / '00031.png')})")
    tab.wait("document.getElementById('banner').textContent.includes('no picture that can be read')")
    assert tab.run("document.getElementById('chip').hidden")
    tab.run(f"usePicture({_file_of(index.root / '00001.png', 'text/plain')})")
    tab.wait("document.getElementById('banner').textContent.includes('Use a picture file')")
    _search(tab, "cat")
    tab.wait("document.getElementById('banner').hidden")


def test_a_broken_sum_is_explained_in_the_language_of_the_page(tab: Tab) -> None:
    said = "document.getElementById('banner').textContent"
    _search(tab, '2*"狗" "猫"')
    tab.wait(f"{said}.includes('cannot be read from')")
    tab.run("document.getElementById('language').click()")
    tab.wait(f'{said}.includes(\'组合查询的写法如 2*"狗" + pool.jpg - "水果"\')')
    assert "cannot" not in tab.run(said)
    tab.run("document.getElementById('language').click()")


def test_a_picture_that_the_browser_cannot_show_leaves_no_broken_icon(tab: Tab) -> None:
    tab.run("usePicture(new File(['none'], 'x.heic', {type: 'image/heic'}))")
    tab.wait("document.querySelector('#chip img').hidden")
    tab.run("change({picture: null, like: '00003.png'})")
    tab.wait("!document.querySelector('#chip img').hidden")
    assert tab.run("document.querySelector('#chip img').hidden") is False


def test_similar_pictures_by_keyboard_and_back(tab: Tab, server: Client) -> None:
    _search(tab, "cat")
    tab.wait(f"{SHOWN} > 3")
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    name = tab.run("document.activeElement.getAttribute('aria-label')")
    assert name == _expected(server, "cat")[1]
    tab.press("Enter")
    tab.wait("document.getElementById('viewer').open && document.getElementById('large').naturalWidth === 300")
    assert tab.run("document.getElementById('name').textContent") == name
    tab.press("ArrowRight")
    tab.press("ArrowLeft")
    tab.press("s")
    similar = [each["name"] for each in server.post("/api/similar", {"name": name}).json["results"]]
    tab.wait(f"{NAMES}[0] === {json.dumps(similar[0])} && !document.getElementById('viewer').open")
    assert tab.run(NAMES)[:20] == similar[:20]
    assert tab.run("document.getElementById('query').value") == ""
    tab.run("history.back()")
    tab.wait(f"{NAMES}[0] === {json.dumps(_expected(server, 'cat')[0])}")
    assert tab.run("document.getElementById('query').value") == "cat"
    tab.run(f"document.getElementById('query').focus(); {TILES}[1].click()")
    tab.press("s")
    tab.wait(f"{NAMES}[0] === {json.dumps(similar[0])}")
    assert tab.run("document.getElementById('query').value") == "", "the key is no text"


def test_a_broken_file_keeps_its_place(tab: Tab) -> None:
    tab.run("scrollTo(0, 400)")
    tab.wait(f"{TILES}[31].matches('.broken')")
    assert tab.run("document.querySelectorAll('.tile.broken').length") == 1
    tab.run(f"{TILES}[31].click()")
    tab.wait("!document.getElementById('unshown').hidden")
    tab.press("Escape")
    tab.wait("!document.getElementById('viewer').open")


def test_thousands_of_results_are_drawn_as_one_scrolls(tab: Tab) -> None:
    assert tab.run(f"{TILES}.length") < 600
    for _ in range(3):
        before = tab.run(f"{TILES}.length")
        tab.run("scrollTo(0, document.body.scrollHeight)")
        tab.wait(f"{TILES}.length > {before}")
    names = tab.run(NAMES)
    assert names == [f"{number:05}.png" for number in range(len(names))]


def test_both_languages_fit_a_phone(tab: Tab) -> None:
    tab.resize(360, 740)
    for language, word in (("zh-CN", "全部图片"), ("en", "All 10,000")):
        tab.run("document.getElementById('language').click()")
        tab.wait(f"document.documentElement.lang === '{language}' && {STATUS}.includes('{word}')")
        tab.run("change({like: '00003.png', text: '', picture: null})")
        tab.wait(f"!document.getElementById('chip').hidden && {NAMES}[0] !== '00000.png'")
        assert tab.run("document.scrollingElement.scrollWidth <= 360"), language
        tab.run(f"{TILES}[0].click()")
        tab.wait("document.getElementById('viewer').open")
        wide = "[...document.querySelectorAll('#about *')].every(each => each.getBoundingClientRect().right <= 360)"
        assert tab.run(wide), language
        tab.press("Escape")
        tab.run("document.getElementById('home').click()")
        tab.wait(f"{NAMES}[0] === '00000.png'")


def test_the_language_of_the_browser_is_spoken(tab: Tab, server: Client) -> None:
    tab.run("localStorage.clear()")
    tab.call("Page.close")
    tab.open(language="zh-TW")
    tab.go(server.url)
    tab.wait("document.documentElement.lang === 'zh-CN' && document.title === 'M2 搜图'")


def test_the_page_goes_on_when_the_server_is_back(browser: Tab, build: Callable[[], Starlette]) -> None:
    with running(build()) as client:
        browser.open()
        browser.go(client.url)
        browser.wait(f"{SHOWN} > 3")
    _search_gone = "document.getElementById('banner').textContent.includes('does not answer')"
    browser.run("document.getElementById('query').focus()")
    browser.type("cat")
    browser.wait(_search_gone)
    with running(build(), port=client.port):
        browser.wait(f"document.getElementById('banner').hidden && {STATUS}.includes('probably match')")
        browser.call("Page.close")


def test_the_reference_of_the_interface(browser: Tab, server: Client) -> None:
    browser.open()
    browser.go(f"{server.url}api")
    browser.wait("document.querySelectorAll('h2').length === 7")
    assert "curl" in browser.run("document.querySelector('pre').textContent")
    browser.call("Page.close")
