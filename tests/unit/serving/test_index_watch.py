"""New pictures are found without a restart; an index that cannot be used leaves the old one in its place."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from m2_encoder.checkpoints.export import export_model
from m2_encoder.picture_search.index import open_index
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.update import update_index
from m2_encoder.serving import index_watch
from m2_encoder.serving.app import build_app
from tests.support.serving import Client, running, small_encoder, small_tokenizer, write_picture
from tests.unit.serving.conftest import LIMITS


def _names(client: Client) -> set[str]:
    found = client.post("/api/search", {"query": "cat"}).json["results"]
    assert {each["name"] for each in client.get("/api/pictures").json["results"]} == {each["name"] for each in found}
    assert client.get("/api/status").json["pictures"] == len(found)
    return {each["name"] for each in found}


def test_an_index_that_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_watch, "_PAUSE_S", 0.0)
    caplog.set_level(logging.WARNING)
    tokenizer, photos, place = small_tokenizer(), tmp_path / "photos", tmp_path / "photos.index"
    encoder = small_encoder(tokenizer)
    model = open_search_model(export_model(tmp_path / "export", model=encoder, tokenizer=tokenizer))
    for name in ("a.png", "b.png"):
        write_picture(photos / name, ord(name[0]))
    update_index(place, photos, model, num_workers=0)
    app = build_app(model.encoder, index=open_index(place), api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        assert _names(client) == {"a.png", "b.png"}
        write_picture(photos / "c.png", 7)
        (photos / "a.png").unlink()
        update_index(place, photos, model, num_workers=0)
        assert _names(client) == {"b.png", "c.png"}
        assert client.get("/api/thumbnails/c.png").status == 200
        assert client.get("/api/thumbnails/a.png").json["code"] == "no_picture_of_this_name"
        assert not caplog.records

        with torch.no_grad():
            encoder.logit_scale.add_(1)
        other = open_search_model(export_model(tmp_path / "other", model=encoder, tokenizer=tokenizer))
        write_picture(photos / "d.png", 8)
        update_index(tmp_path / "other.index", photos, other, num_workers=0)
        shutil.copy(tmp_path / "other.index" / "index.json", place / "index.json")
        for features in (tmp_path / "other.index").glob("features-*"):
            shutil.copy(features, place)
        assert _names(client) == {"b.png", "c.png"}
        assert "is of another model now" in caplog.text

        (place / "index.json").write_text("{")
        assert _names(client) == {"b.png", "c.png"}
        assert "the index as it was before is served" in caplog.text
        (place / "index.json").unlink()
        assert _names(client) == {"b.png", "c.png"}
        assert client.get("/api/thumbnails/c.png").status == 200
