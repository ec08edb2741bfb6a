"""mteb's own evaluation with our encoder, on small tasks made here, beside our measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.evaluation.doors.mieb import MiebEncoder
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.measures.classification import class_vectors, measure_classification
from m2_encoder.evaluation.measures.retrieval import measure_retrieval
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.evaluation_sets import counting_model
from tests.support.models import random_model, small_config
from tests.support.peer_models import picture

NUMBER = 30
LABELS = ["a red square", "一只猫", "the green ball", "old house"]
PICTURES = [picture(number, size=(40 + number, 30)) for number in range(NUMBER)]
TEXTS = [f"{LABELS[number % 4]} {number}" for number in range(NUMBER)]

pytestmark = pytest.mark.filterwarnings("ignore")  # of mteb and what it imports


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    torch.manual_seed(3)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=12)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))
    return open_model(export_model(tmp_path_factory.mktemp("run") / "mine", model=model, tokenizer=tokenizer))


def features(opened: EvaluatedModel) -> tuple[Tensor, Tensor]:
    assert opened.model is not None
    images = torch.stack([opened.preprocess(image) for image in PICTURES])
    return encode_images(opened.model, images), encode_texts(opened.model, TEXTS, opened.tokenizer)


def metadata(kind: str, name: str, category: str) -> Any:
    mteb = pytest.importorskip("mteb")
    return mteb.TaskMetadata(
        type=kind, name=name, category=category, main_score="accuracy" if "Class" in kind else "ndcg_at_10",
        modalities=["image", "text"], description="made here", reference=None, eval_langs=["eng-Latn"],
        dataset={"path": "none/none", "revision": "1"}, eval_splits=["test"], date=None, domains=None,
        task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
        bibtex_citation=None,
    )  # fmt: skip


def classification_task() -> Any:
    pytest.importorskip("mteb")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskZeroShotClassification

    class Made(AbsTaskZeroShotClassification):
        metadata = metadata("ZeroShotClassification", "MadeZeroShot", "i2t")

        def load_data(self, **_options: Any) -> None:
            rows = {"image": PICTURES, "label": [number * number % 4 for number in range(NUMBER)]}
            self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_dict(rows)}), True

        def get_candidate_labels(self) -> list[str]:
            return LABELS

    return Made()


def retrieval_task(queries: str) -> Any:
    """Every text belongs to the picture of its number; `queries` is what is asked with, text or image."""
    pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    columns: dict[str, list[Any]] = {"text": TEXTS, "image": PICTURES}
    (gallery,) = {"text", "image"} - {queries}

    class Made(AbsTaskRetrieval):
        metadata = metadata("Any2AnyRetrieval", "MadeRetrieval", "t2i" if queries == "text" else "i2t")

        def load_data(self, **_options: Any) -> None:
            split = RetrievalSplitData(
                queries=Dataset.from_dict({"id": [f"q{n}" for n in range(NUMBER)], queries: columns[queries]}),
                corpus=Dataset.from_dict({"id": [f"d{n}" for n in range(NUMBER)], gallery: columns[gallery]}),
                relevant_docs={f"q{n}": {f"d{n}": 1} for n in range(NUMBER)},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Made()


def evaluate(encoder: MiebEncoder, task: Any) -> dict[str, float]:
    """Through mteb's front door, without its cache."""
    import mteb

    found = mteb.evaluate(encoder, task, cache=None, encode_kwargs={"batch_size": 8}, show_progress_bar=False)
    (result,) = found.task_results
    (scores,) = result.scores["test"]
    assert found.model_name == "m2-encoder/mine"
    return dict(scores)


def test_zero_shot_accuracy_is_that_of_our_measure(opened: EvaluatedModel) -> None:
    task = classification_task()
    found = evaluate(MiebEncoder(opened), task)
    assert opened.model is not None
    vectors = class_vectors(encode_texts(opened.model, LABELS, opened.tokenizer)[:, None])
    targets = torch.arange(NUMBER) ** 2 % 4
    own = {each.metric: each for each in measure_classification(features(opened)[0], vectors, targets).measurements}
    assert found["accuracy"] == pytest.approx(own["top1"].value / 100)
    assert 0 < found["accuracy"] < 1


@pytest.mark.parametrize(("queries", "way"), [("text", "t2i"), ("image", "i2t")])
def test_recalls_are_those_of_our_measure(opened: EvaluatedModel, queries: str, way: str) -> None:
    task = retrieval_task(queries)
    found = evaluate(MiebEncoder(opened), task)
    images, texts = features(opened)
    pairs = torch.arange(NUMBER)[:, None].expand(-1, 2)
    own = {each.metric: each.value / 100 for each in measure_retrieval(images, texts, pairs).measurements}
    for k in (1, 5, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(own[f"{way}_r@{k}"], abs=1e-5)
    assert 0 < found["recall_at_10"] < 1


def test_picture_with_text_is_the_sum_of_both(opened: EvaluatedModel) -> None:
    pytest.importorskip("mteb")
    batches = [
        {"image": PICTURES[start : start + 7], "text": TEXTS[start : start + 7], "id": ["x"] * 7}
        for start in range(0, NUMBER, 7)
    ]
    encoder = MiebEncoder(opened)
    images, texts = features(opened)
    found = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", batch_size=7)
    torch.testing.assert_close(found, functional.normalize(images + texts, dim=-1), atol=1e-5, rtol=0)
    table = encoder.similarity(found.numpy(), 3 * texts)
    torch.testing.assert_close(table, functional.cosine_similarity(found[:, None], texts[None], dim=-1))
    torch.testing.assert_close(encoder.similarity_pairwise(found, texts), table.diagonal())


def test_mteb_knows_what_it_measured(opened: EvaluatedModel) -> None:
    protocols = pytest.importorskip("mteb.models")
    encoder = MiebEncoder(opened)
    assert isinstance(encoder, protocols.EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.revision) == ("m2-encoder/mine", opened.fingerprint)
    assert (meta.embed_dim, meta.n_parameters) == (opened.facts.embed_dim, opened.facts.parameters)
    assert meta.modalities == ["image", "text"]


def test_model_of_somebody_else_is_accepted() -> None:
    pytest.importorskip("mteb")
    encoder = MiebEncoder(counting_model())
    found = encoder.encode([{"image": [Image.new("L", (20, 30), 90)]}, {"image": [Image.new("RGB", (9, 9))]}])
    assert found.shape == (2, 6)


def test_pictures_alone_are_what_a_model_without_a_text_tower_is_asked_for(opened: EvaluatedModel) -> None:
    mteb = pytest.importorskip("mteb")
    encoder = MiebEncoder(dataclasses.replace(opened, no_texts="it has no tokenizer"))
    assert len(encoder.encode([{"image": PICTURES}])) == NUMBER
    with pytest.raises(UserError, match="it has no tokenizer; choose tasks that need pictures alone"):
        encoder.encode([{"text": TEXTS}])
    with pytest.raises(ValueError, match=r"m2-encoder/mine supports \['image'\]"):  # mteb's own, before it starts
        mteb.evaluate(encoder, classification_task(), cache=None, show_progress_bar=False)


def test_columns_that_no_model_here_takes(opened: EvaluatedModel) -> None:
    pytest.importorskip("mteb")
    with pytest.raises(UserError, match="a task of mteb has the columns audio, id; models here take text and image"):
        MiebEncoder(opened).encode([{"audio": [b""], "id": ["1"]}])


def test_features_cannot_be_evaluated_there(opened: EvaluatedModel) -> None:
    with pytest.raises(UserError, match="mine: are features, not a model"):
        MiebEncoder(dataclasses.replace(opened, model=None))


def test_package_that_is_missing_is_named(opened: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"evaluations by mteb need the package mteb; .*m2-encoder\[doors\]"):
        MiebEncoder(opened)
