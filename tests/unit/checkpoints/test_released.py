"""Released weights by name: found in folders and caches, fetched from hubs that may fail in every way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2_encoder import CheckpointError, UserError, load
from m2_encoder.checkpoints import released
from m2_encoder.checkpoints.released import RELEASES, Release, find_release, find_release_tokenizer
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.file_server import FileServer, serve

NAME, FILE = "m2-encoder-1b", "m2_encoder_1B.ckpt"
REPOSITORY = "M2Cognition/M2_Encoder_Large"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any cache; no variable of the developer's own."""
    for name in (
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "MODELSCOPE_CACHE",
        "M2_ENCODER_CACHE",
        "M2_ENCODER_WEIGHTS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:1")  # where nobody listens
    return tmp_path / "home"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    torch.save({"a": torch.zeros(300_000)}, tmp_path / "a.ckpt")
    return (tmp_path / "a.ckpt").read_bytes()


@pytest.fixture
def mirror(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serve(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url("mirror"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield server


def put(place: Path, content: bytes = b"weights") -> Path:
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    return place


@pytest.mark.parametrize("inside", ["", "M2_Encoder_Large/", "M2Cognition/M2_Encoder_Large/"])
def test_a_folder_of_ones_own(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2_ENCODER_WEIGHTS", str(tmp_path / "own"))
    file = put(tmp_path / "own" / f"{inside}{FILE}")
    assert find_release(NAME) == file


@pytest.mark.parametrize(
    "place",
    [
        f".cache/modelscope/hub/models/{REPOSITORY}/{FILE}",
        f".cache/modelscope/hub/{REPOSITORY}/{FILE}",
        f".cache/huggingface/hub/models--M2Cognition--M2_Encoder_Large/snapshots/abc/{FILE}",
        f".cache/m2_encoder/{FILE}",
    ],
)
def test_caches_of_hubs(place: str, home: Path) -> None:
    file = put(home / place)
    assert find_release(NAME) == file


def test_configured_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    second = put(tmp_path / "hf" / "hub" / "models--M2Cognition--M2_Encoder_Large" / "snapshots" / "1" / FILE)
    assert find_release(NAME) == second
    first = put(tmp_path / "scope" / "models" / REPOSITORY / FILE)
    assert find_release(NAME) == first


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2_ENCODER_WEIGHTS", "/no/such/folder")
    with pytest.raises(UserError, match="M2_ENCODER_WEIGHTS=/no/such/folder: no such folder"):
        find_release(NAME)


def test_offline_nothing_is_asked() -> None:
    with pytest.raises(CheckpointError, match=r"no hub is asked, as HF_HUB_OFFLINE is set.*M2_ENCODER_WEIGHTS"):
        find_release(NAME)


def test_a_mirror(mirror: FileServer, content: bytes) -> None:
    assert find_release(NAME).read_bytes() == content
    assert mirror.paths == [f"/mirror/{REPOSITORY}/resolve/main/{FILE}"]
    mirror.status = 500
    assert find_release(NAME).read_bytes() == content, "it is in the cache"


def test_the_hash_of_a_redirection_is_verified(mirror: FileServer, content: bytes, home: Path) -> None:
    mirror.linked = hashlib.sha256(content).hexdigest()
    assert find_release(NAME).read_bytes() == content
    assert [path.split("/")[1] for path in mirror.paths] == ["mirror", "stored"]


def test_a_mirror_that_sends_something_else_is_not_believed(mirror: FileServer, home: Path) -> None:
    mirror.linked = "0" * 64
    with pytest.raises(CheckpointError, match=f"its sha256 is .*, expected {'0' * 64}; the file was deleted"):
        find_release(NAME)
    assert not list(home.rglob("*.ckpt*.part"))


def test_a_mirror_that_shows_a_page(mirror: FileServer) -> None:
    mirror.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match=r"not a checkpoint.*127\.0\.0\.1:1.*refused"):
        find_release(NAME)


def test_every_place_and_its_answer_is_named(mirror: FileServer) -> None:
    mirror.status = 404
    with pytest.raises(CheckpointError) as caught:
        find_release(NAME)
    said = str(caught.value)
    assert f"{mirror.url('mirror')}/{REPOSITORY}/resolve/main/{FILE}: the server says 404" in said
    assert f"https://127.0.0.1:1/models/{REPOSITORY}/resolve/master/{FILE}: " in said
    assert "set M2_ENCODER_WEIGHTS to its folder, HF_ENDPOINT to a mirror, or pass weights='m2_encoder_1B.ckpt'" in said


def test_a_broken_download_is_continued(mirror: FileServer, content: bytes) -> None:
    mirror.stop_after = 1_000_000
    with pytest.raises(CheckpointError, match=r"ended after 1,000,000 of .*; run it again to continue"):
        find_release(NAME)
    mirror.stop_after = None
    assert find_release(NAME).read_bytes() == content
    assert mirror.requested_ranges == [None, "bytes=1000000-"]


def test_a_broken_download_keeps_no_other_place_from_being_asked(
    mirror: FileServer, content: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.stop_after = 1_000_000
    with pytest.raises(CheckpointError, match=rf"ended after .*127\.0\.0\.1:1/models/{REPOSITORY}/.*refused.*set M2_"):
        find_release(NAME)
    mirror.status = 404
    with pytest.raises(CheckpointError, match=rf"says 404.*127\.0\.0\.1:1/models/{REPOSITORY}/.*refused.*set M2_ENC"):
        find_release(NAME)
    with serve(content) as other:
        monkeypatch.setattr(released, "_hubs", lambda _: [mirror.url("mirror"), other.url("other")])
        monkeypatch.setenv("M2_ENCODER_CACHE", str(home / "cache"))
        mirror.status = None
        assert find_release(NAME).read_bytes() == content
        assert [len(server.paths) for server in (mirror, other)] == [3, 1]
    assert not list((home / "cache").glob("*.part*")), "what another place sent in part is of no use any more"


def test_an_address_is_said_once(mirror: FileServer) -> None:
    mirror.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError) as caught:
        find_release(NAME)
    address = f"{mirror.url('mirror')}/{REPOSITORY}/resolve/main/{FILE}"
    assert f"({address}: what the server sent is not a checkpoint" in str(caught.value)
    assert str(caught.value).count(address) == 1
    mirror.loops = True
    with pytest.raises(CheckpointError) as caught:
        find_release(NAME)
    assert f"({address}: the server says 302 in a loop of redirections: Found; https" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (None, "; set M2_ENCODER_WEIGHTS to its folder, HF_ENDPOINT to a mirror, or pass"),
        ("", "; set M2_ENCODER_WEIGHTS, which is empty, to its folder, HF_ENDPOINT to a mirror, or pass"),
        (".", "; put it into M2_ENCODER_WEIGHTS=., set HF_ENDPOINT to a mirror, or pass"),
    ],
)
def test_the_advice_follows_the_folder_that_is_set(
    value: str | None, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("M2_ENCODER_WEIGHTS", value)
    with pytest.raises(CheckpointError) as caught:
        find_release(NAME)
    assert f"{advice} weights='{FILE}'" in str(caught.value)


def test_a_fetched_tokenizer_that_lost_its_bytes_is_fetched_again(
    mirror: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = load_emoji_tokenizer_model()
    monkeypatch.setattr(released, "TOKENIZER_SHA256", hashlib.sha256(right).hexdigest())
    mirror.content = right
    path = find_release_tokenizer(NAME, tmp_path / FILE)
    path.write_bytes(right[:1000])
    assert find_release_tokenizer(NAME, tmp_path / FILE).read_bytes() == right


@pytest.mark.parametrize("fetched", [True, False])
def test_fetched_weights_that_are_damaged_are_removed_and_ones_own_are_not(
    mirror: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch, fetched: bool
) -> None:
    monkeypatch.setitem(RELEASES, "tiny", Release("M2Cognition/Tiny", "tiny.ckpt"))  # type: ignore[arg-type]
    home.mkdir()
    model = M2Encoder(M2EncoderConfig.from_name("tiny"))
    torch.save({"state_dict": model.state_dict()}, home / "whole.ckpt")
    mirror.content = (home / "whole.ckpt").read_bytes()
    tokenizer = load_emoji_tokenizer_model()
    if not fetched:
        put(home / ".cache" / "m2_encoder" / "tiny.ckpt", mirror.content)
    path = find_release("tiny")
    path.write_bytes(mirror.content[:-100] + bytes(100))
    removed = "; it was removed from the cache of downloads, run it again to fetch it"
    with pytest.raises(CheckpointError) as caught:
        load("tiny", tokenizer=tokenizer)
    assert str(caught.value).startswith(f"{path}: damaged")
    assert str(caught.value).endswith(removed) is fetched
    assert path.exists() is not fetched
    if fetched:
        load("tiny", tokenizer=tokenizer)


def test_a_proxy_of_the_environment_is_used(
    mirror: FileServer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", mirror.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert find_release(NAME).read_bytes() == content
    assert mirror.paths == [f"http://hub.invalid/{REPOSITORY}/resolve/main/{FILE}"]


def test_load_by_name_takes_the_tokenizer_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = M2EncoderConfig.from_name("tiny")
    monkeypatch.setitem(RELEASES, "tiny", Release("M2Cognition/Tiny", "tiny.ckpt"))  # type: ignore[arg-type]
    monkeypatch.setenv("M2_ENCODER_WEIGHTS", str(tmp_path))
    model = M2Encoder(config)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.ckpt")
    loaded = load("tiny")
    assert torch.equal(
        loaded.model.encode_image(torch.zeros(1, 3, 32, 32)), model.eval().encode_image(torch.zeros(1, 3, 32, 32))
    )
    said = (
        r"sp\.model is not on this machine, .*\(no hub is asked.*; put it beside .*tiny\.ckpt, or pass tokenizer=FILE"
    )
    with pytest.raises(UserError, match=said):
        loaded.tokenizer(["a"])
    (tmp_path / "sp.model").write_bytes(load_emoji_tokenizer_model())
    assert load("tiny").tokenizer(["a cat"]).ids.shape[0] == 1


@pytest.mark.parametrize(
    "place",
    [
        "own/vlmo/tokenizer/sp.model",
        "home/.cache/modelscope/hub/models/M2Cognition/M2-Encoder/sp.model",
        "home/.cache/huggingface/hub/models--M2Cognition--M2_Encoder_Huge/snapshots/1/vlmo/tokenizer/sp.model",
        "home/.cache/m2_encoder/sp.model",
    ],
)
def test_the_tokenizer_of_any_release(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / place)
    if place.startswith("own"):
        monkeypatch.setenv("M2_ENCODER_WEIGHTS", str(tmp_path / "own"))
    assert find_release_tokenizer(NAME, tmp_path / "elsewhere" / FILE) == file


def test_the_tokenizer_is_fetched_and_must_be_the_known_one(
    mirror: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = load_emoji_tokenizer_model()
    monkeypatch.setattr(released, "TOKENIZER_SHA256", hashlib.sha256(right).hexdigest())
    monkeypatch.setattr(released, "_TOKENIZER_SOURCE", mirror.url("source/sp.model"))
    mirror.others = {"source/sp.model": right}  # the mirror itself has something else
    assert find_release_tokenizer(NAME, tmp_path / FILE).read_bytes() == right
    assert [path.replace(f"/mirror/{REPOSITORY}/resolve/main", "") for path in mirror.paths] == [
        "/sp.model", "/vlmo/tokenizer/sp.model", "/source/sp.model",
    ]  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_release_tokenizer(NAME, tmp_path / FILE).read_bytes() == right, "it is in the cache"


def test_what_was_fetched_is_found_offline(mirror: FileServer, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_release(NAME).read_bytes() == content
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_release(NAME).read_bytes() == content
