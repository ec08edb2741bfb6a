"""The JSON interface: what is found equals the model called by hand."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.ending import find_end
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.picture_search.results import find_results
from m2_encoder.serving.app import build_app
from tests.support.serving import Client, index_in_memory, running, small_encoder, small_model, small_tokenizer
from tests.unit.serving.conftest import LIMITS


def _text_features(*texts: str) -> np.ndarray:
    tokenizer = small_tokenizer()
    with torch.no_grad():
        return small_encoder(tokenizer).encode_text(tokenizer(list(texts))).numpy()


def _normal(feature: np.ndarray) -> np.ndarray:
    return feature / np.linalg.norm(feature)


def _expect(answer: object, index: PictureIndex, feature: np.ndarray, count: int, without: str = "") -> None:
    """The answer has the best pictures for a feature."""
    scores = index.features @ feature
    best = [index.names[row] for row in np.argsort(-scores) if index.names[row] != without][:count]
    results = answer["results"]  # type: ignore[index]
    assert [each["name"] for each in results] == best
    wanted = [scores[index.names.index(name)] for name in best]
    np.testing.assert_allclose([each["score"] for each in results], wanted, atol=2e-5)


@pytest.mark.parametrize("query", ["红色的水果", "a red fruit", "一只 cat 在 beach\n上"])
def test_words(server: Client, index: PictureIndex, query: str) -> None:
    answer = server.post("/api/search", {"query": query, "count": 7})
    assert answer.status == 200
    _expect(answer.json, index, _text_features(query)[0], 7)
    feature = _text_features(query)[0]
    scores = index.features @ feature
    assert (answer.json["total"], answer.json["end"]) == (30, find_end(-np.sort(-scores), scores, 30))


def test_fifty_thousand_pictures_and_eight_clients(model: EvaluatedModel, tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(50_000, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = index_in_memory(tmp_path, [f"{number}.jpg" for number in range(len(features))], features)
    words = [f"红色的水果 {number}" for number in range(24)]
    app = build_app(model, index=index, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda query: client.post("/api/search", {"query": query}), words))
    for answer, feature in zip(answers, _text_features(*words), strict=True):
        scores = features @ feature
        best = [index.names[row] for row in np.argsort(-scores)[:60]]
        found = [each["name"] for each in answer.json["results"]]
        assert found[:5] == best[:5]
        assert len(set(found) & set(best)) >= 59, "two may be as good as each other"


def test_a_sum_of_words_and_pictures(server: Client, index: PictureIndex) -> None:
    dog, fruit = _text_features("狗", "水果")
    feature = _normal(2 * dog + index.features[3] - fruit)
    answer = server.post("/api/search", {"query": '2*"狗" + beach/3.png - "水果"'}).json
    _expect(answer, index, feature, 30, without="beach/3.png")
    assert answer["total"] == 29


def test_a_picture_by_its_own_name_as_the_command_finds_it(model: EvaluatedModel, tmp_path: Path) -> None:
    names = ["2*x.png", "holiday.jpg-1.png", '中文/红 苹果 - "引号".png', *(f"{number}.png" for number in range(300))]
    features = np.random.default_rng(2).normal(size=(len(names), 16)).astype(np.float32)
    features[3:6] = features[0]
    features /= np.linalg.norm(features, axis=1, keepdims=True) * (1 - 1e-5)  # rounded up, as halves may be
    index = index_in_memory(tmp_path, names, features)
    app = build_app(model, index=index, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        for row, name in enumerate(names[:3]):
            answer = client.post("/api/search", {"query": name, "count": 2}).json
            expected = find_results(index, _normal(features[row]), 2, query=name, without=[row])
            assert name not in {each["name"] for each in answer["results"]}
            assert answer["total"] == len(names) - 1
            assert answer["end"] == expected.end
            found = [(each.name, pytest.approx(each.score, abs=1e-6)) for each in expected.rows]
            assert [(each["name"], each["score"]) for each in answer["results"]] == found
            assert expected.rows[0].score <= 1
            assert answer["results"][0]["score"] <= 1
            assert find_results(index, _normal(features[row]), 200, query=name, without=[row]).end == expected.end
        alike = client.post("/api/similar", {"name": names[0], "count": 2}).json
    assert alike["end"] >= 3, "more than are shown"
    assert [each["score"] for each in alike["results"]] == [1, 1]


def test_a_picture_alone_and_with_words(server: Client, index: PictureIndex, photo: Path) -> None:
    alone = server.send_form("/api/search", {"image": photo.read_bytes(), "count": "3"}).json
    assert alone["results"][0] == {"name": "beach/3.png", "score": pytest.approx(1, abs=1e-5)}
    both = server.send_form("/api/search", {"image": photo.read_bytes(), "query": "猫"}).json
    _expect(both, index, _normal(index.features[3] + _text_features("猫")[0]), 30)


def test_similar_pictures_are_without_itself(server: Client, index: PictureIndex) -> None:
    name = "我的 图片/2 #?%41.jpg"
    answer = server.post("/api/similar", {"name": name, "count": 5}).json
    _expect(answer, index, index.features[index.names.index(name)], 5, without=name)
    assert answer["total"] == 29


def test_copies_of_the_picture_do_not_decide_where_results_end(model: EvaluatedModel, index: PictureIndex) -> None:
    rng = np.random.default_rng(1)
    far = rng.normal(size=(200, 16))
    alike = far[0] + rng.normal(scale=0.15, size=(5, 16))
    rows = np.concatenate([far[:1], far[:1], alike, far[1:]])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    names = [f"{number}.png" for number in range(len(rows))]
    app = build_app(model, index=index_in_memory(index.root, names, rows), api_key=None, only_loopback=True,
                    limits=LIMITS)  # fmt: skip
    with running(app) as client:
        answer = client.post("/api/similar", {"name": "0.png", "count": 6}).json
    assert answer["results"][0]["name"] == "1.png"
    assert {each["name"] for each in answer["results"][1:]} == {f"{number}.png" for number in range(2, 7)}
    scores = np.sort(rows[2:] @ rows[0])[::-1]
    assert answer["end"] == 1 + find_end(scores, rows @ rows[0], len(rows))
    assert answer["end"] > 3


def test_searches_that_meet_are_told_apart(server: Client, index: PictureIndex) -> None:
    with ThreadPoolExecutor(12) as pool:
        texts = [f"水果 {number}" for number in range(60)]
        answers = list(pool.map(lambda text: server.post("/api/search", {"query": text, "count": 9}).json, texts))
        alike = list(pool.map(lambda name: server.post("/api/similar", {"name": name}).json, index.names))
    for text, answer in zip(texts, answers, strict=True):
        _expect(answer, index, _text_features(text)[0], 9)
    for name, answer in zip(index.names, alike, strict=True):
        _expect(answer, index, index.features[index.names.index(name)], 60, without=name)


def test_parts_of_a_list_join_without_a_gap(server: Client) -> None:
    for path, body in (("/api/search", {"query": "猫"}), ("/api/similar", {"name": "beach/0.png"})):
        whole = server.post(path, {**body, "count": 30}).json["results"]
        parts = [server.post(path, {**body, "start": start, "count": 7}).json["results"] for start in range(0, 35, 7)]
        assert [each for part in parts for each in part] == whole
    names = [server.get(f"/api/pictures?start={start}&count=16").json["results"] for start in (0, 16, 32)]
    assert len({each["name"] for part in names for each in part}) == 30


def test_features_equal_the_model_called_by_hand(server: Client, index: PictureIndex, photo: Path) -> None:
    texts = ["一只猫", "a cat", "", "x" * 5000]
    answer = server.post("/api/embed", {"texts": texts}).json
    np.testing.assert_allclose(answer["features"], _text_features(*texts), atol=1e-5)
    picture = server.send_form("/api/embed", {"image": photo.read_bytes()}).json
    np.testing.assert_allclose(picture["features"][0], index.features[3], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "query is missing"),
        ({"query": " \n"}, "query is empty"),
        ({"query": 3}, "query must be a text"),
        ({"query": "cat", "count": 0}, "count=0: must be a whole number, 1 to 500"),
        ({"query": "cat", "count": 501}, "count=501"),
        ({"query": "cat", "count": True}, "count=True"),
        ({"query": "cat", "start": -1}, "start=-1"),
        ({"query": "cat", "top": 3}, "top is unknown here; known: query, start, count"),
        ({"query": '"cat" - "cat"'}, "cancel each other"),
        ({"query": "\ud800"}, "no Unicode"),
        ([], "must be a JSON object"),
    ],
)
def test_what_makes_no_sense_is_named(server: Client, body: object, said: str) -> None:
    answer = server.post("/api/search", body)
    assert (answer.status, answer.json["code"]) == (422, "invalid")
    assert said in answer.json["detail"]


def test_pictures_that_the_index_has_not(server: Client) -> None:
    for path, body in (
        ("/api/similar", {"name": "beach/99.png"}),
        ("/api/search", {"query": "/etc/hostname.png"}),
        ("/api/search", {"query": '"cat" + ../secret.jpg'}),
    ):
        answer = server.post(path, body)
        assert (answer.status, answer.json["code"]) == (404, "no_picture_of_this_name"), body


def test_without_an_index(model: EvaluatedModel, photo: Path) -> None:
    app = build_app(model, index=None, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        assert client.get("/api/status").json == {
            "model": "small", "runtime": "torch", "feature_dim": 16, "pictures": None,
        }  # fmt: skip
        for answer in (client.post("/api/search", {"query": "cat"}), client.get("/api/thumbnails/a.png")):
            assert (answer.status, answer.json["code"]) == (404, "no_index")
        assert client.post("/api/embed", {"texts": ["猫"]}).status == 200
        entries = json.dumps({"clip": {"visual": {"modelName": "ViT-B-32__openai"}}})
        assert client.send_form("/predict", {"entries": entries, "image": photo.read_bytes()}).status == 200


def test_answers_are_as_the_document_says(server: Client) -> None:
    document = server.get("/api/openapi.json").json
    schemas = document["components"]["schemas"]
    answers = {
        "search": server.post("/api/search", {"query": "cat", "count": 2}),
        "findSimilar": server.post("/api/similar", {"name": "beach/3.png", "count": 2}),
        "listPictures": server.get("/api/pictures?count=2"),
        "embed": server.post("/api/embed", {"texts": ["cat"]}),
        "getStatus": server.get("/api/status"),
    }
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    assert len({each["operationId"] for each in operations}) == len(operations)
    for each in operations:
        assert {"400", "403", "404", "408", "500", "503"} <= set(each["responses"])
        if (answer := answers.get(each["operationId"])) is None:
            continue
        shown = each["responses"]["200"]["content"]["application/json"]["schema"]
        schema = schemas[shown["$ref"].rpartition("/")[2]] if "$ref" in shown else shown
        assert answer.status == 200
        assert set(answer.json) == set(schema["required"]) == set(schema["properties"]), each["operationId"]
        for row in answer.json.get("results", ()):
            assert set(row) == set(schema["properties"]["results"]["items"]["required"])


def test_nobody_is_told_where_the_model_lies(index: PictureIndex) -> None:
    model = dataclasses.replace(small_model(), name="/srv/models/export")
    app = build_app(model, index=index, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        for answer in (client.get("/api/status"), client.post("/api/embed", {"texts": ["cat"]})):
            assert answer.json["model"] == "export"


def test_the_document_names_every_address(server: Client) -> None:
    document = server.get("/api/openapi.json").json
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method in methods:
            answer = server.ask(method.upper(), path.replace("{name}", "beach/0.png"))
            assert answer.status not in (404, 405), path
    names = {path.split("/")[2] for path in document["paths"]}
    assert names == {"search", "similar", "pictures", "embed", "status", "thumbnails", "files"}
