"""One folder that ours, transformers and sentence-transformers open, and the same features from each."""

from __future__ import annotations

import json
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from PIL import Image

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import search
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.exports.transformers_format import REMOTE_CODE, write_transformers
from m2_encoder.hub import LoadedModel
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config
from tests.support.pictures import write_picture
from tests.support.remote_code import code_apart

transformers = pytest.importorskip("transformers", minversion="5.0", reason="opens what is written")

TEXTS = [
    "一只猫",
    "a dog in the snow",
    "",
    "红色的 apple",
    "one two three four five six seven eight nine ten eleven twelve",
]
COLOURS = {"红色": (220, 20, 20), "green": (20, 200, 30), "蓝色的": (20, 30, 210), "yellow": (230, 220, 30)}
PICTURES = [Image.new("RGB", (24 + 3 * n, 40 - 5 * n), colour) for n, colour in enumerate(COLOURS.values())]


class Opened(NamedTuple):
    folder: Path
    ours: LoadedModel
    model: Any
    processor: Any


@pytest.fixture(scope="module", autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is asked over a network, and copies of code go to a folder of the tests."""

    def refuse(_socket: Any, address: Any) -> NoReturn:
        raise AssertionError(f"asks {address}")

    with code_apart(tmp_path_factory.mktemp("modules")) as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


def write(folder: Path, config: M2EncoderConfig) -> Path:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=config.context_length)
    export_model(folder, model=random_model(config), tokenizer=tokenizer)
    write_transformers(folder, config=config, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = write(tmp_path_factory.mktemp("export") / "model", small_config(vocab_size=3500))
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    return Opened(
        folder, load(folder), model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    )


def test_loaded_twice_it_is_equal_twice_and_equal_to_ours(opened: Opened) -> None:
    again = transformers.AutoModel.from_pretrained(opened.folder, trust_remote_code=True)
    states = opened.model.state_dict(), again.state_dict(), opened.ours.model.state_dict()
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for name, value in states[2].items():
        assert states[0][name].equal(value), name
        assert states[1][name].equal(value), name


def test_texts_and_pictures_have_our_features(opened: Opened) -> None:
    inputs = opened.processor(text=TEXTS, images=PICTURES, padding=True, truncation=True, return_tensors="pt")
    pixels = torch.stack([opened.ours.preprocess(picture) for picture in PICTURES])
    with torch.inference_mode():
        texts = opened.ours.model.encode_text(opened.ours.tokenizer(TEXTS))
        images = opened.ours.model.encode_image(pixels)
        found = opened.model(**inputs)
        logits = opened.ours.model.similarity(images, texts)
    torch.testing.assert_close(found.text_embeds, texts, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.image_embeds, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-4, rtol=0)
    assert found.loss is None
    assert found.logits_per_text.equal(found.logits_per_image.t())


@pytest.mark.parametrize("name", ["m2-encoder-0.4b", "m2-encoder-1b", "m2-encoder-10b"])
def test_published_architectures_have_the_same_parameters(name: str) -> None:
    from m2_encoder.exports.remote_code.configuration_m2_encoder import M2EncoderConfig as RemoteConfig
    from m2_encoder.exports.remote_code.modeling_m2_encoder import M2EncoderModel

    config = M2EncoderConfig.from_name(name)
    with torch.device("meta"):
        ours, theirs = M2Encoder(config), M2EncoderModel(RemoteConfig(model=config.to_dict()))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_pictures_are_squashed_and_normalised_once(opened: Opened) -> None:
    wide = Image.new("RGB", (200, 20), (255, 255, 255))
    wide.paste((0, 0, 0), (0, 0, 100, 20))
    pixels = opened.processor.image_processor(images=[wide], return_tensors="pt")["pixel_values"]
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    torch.testing.assert_close(pixels[0] * 0.5 + 0.5, opened.ours.preprocess(wide), atol=1.01 / 255, rtol=0)


def test_pipeline_answers_as_ours(opened: Opened) -> None:
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(opened.folder), trust_remote_code=True)
    labels = list(COLOURS)
    found = pipe(PICTURES[0], candidate_labels=labels, hypothesis_template="{}")
    model, preprocess, tokenizer = opened.ours
    with torch.inference_mode():
        logits = model.similarity(
            model.encode_image(preprocess(PICTURES[0])[None]), model.encode_text(tokenizer(labels))
        )
    expected = dict(zip(labels, logits[0].softmax(0).tolist(), strict=True))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-4)


def test_sentence_transformers_gives_our_features(opened: Opened) -> None:
    library = pytest.importorskip("sentence_transformers", minversion="6.0", reason="opens what is written")
    encoder = library.SentenceTransformer(str(opened.folder), trust_remote_code=True, device="cpu")
    assert encoder.get_embedding_dimension() == opened.ours.model.config.feature_dim
    assert encoder.max_seq_length == opened.ours.model.config.context_length
    texts = encoder.encode(TEXTS, convert_to_tensor=True)
    images = encoder.encode(PICTURES, convert_to_tensor=True)
    model, preprocess, tokenizer = opened.ours
    with torch.inference_mode():
        torch.testing.assert_close(texts, model.encode_text(tokenizer(TEXTS)), atol=1e-6, rtol=0)
        ours = model.encode_image(torch.stack([preprocess(picture) for picture in PICTURES]))
    torch.testing.assert_close(images, ours, atol=1e-5, rtol=0)
    hits = library.util.semantic_search(texts, images, top_k=2)
    best = (ours @ texts.t()).topk(2, dim=0).indices.t().tolist()
    assert [[hit["corpus_id"] for hit in row] for row in hits] == best


def test_semantic_search_finds_what_m2_search_finds(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = pytest.importorskip("sentence_transformers", minversion="6.0", reason="opens what is written")
    for number in range(30):
        write_picture(tmp_path / "photos" / f"{number:02}.png", number, side=40)

    def m2_search(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["m2-search", *arguments])
        assert search.main() == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    m2_search("index", "photos", f"model={opened.folder}", "num_workers=0", "device=cpu")
    files = sorted((tmp_path / "photos").iterdir())
    encoder = library.SentenceTransformer(str(opened.folder), trust_remote_code=True, device="cpu")
    pictures = encoder.encode([Image.open(file) for file in files], convert_to_tensor=True)
    queries = ["红色的水果", "a dog in the snow"]
    theirs = library.util.semantic_search(encoder.encode(queries, convert_to_tensor=True), pictures, top_k=20)
    for query, hits in zip(queries, theirs, strict=True):
        ours = json.loads(m2_search("query", "photos.index", query, "format=json", "top=20", "device=cpu"))["results"]
        assert [row["name"] for row in ours] == [files[hit["corpus_id"]].name for hit in hits]
        assert [row["score"] for row in ours] == pytest.approx([hit["score"] for hit in hits], abs=1e-3)


def test_trainer_lowers_the_loss_and_what_it_saves_opens_everywhere(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = transformers.AutoModel.from_pretrained(opened.folder, trust_remote_code=True)
    inputs = opened.processor(text=list(COLOURS), images=PICTURES, padding=True, truncation=True, return_tensors="pt")
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(len(PICTURES))]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows,
        data_collator=lambda some: {**transformers.default_data_collator(some), "return_loss": True},
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    ours = load(opened.folder, weights=tmp_path / "saved" / "model.safetensors")
    with torch.inference_mode():
        texts = model(**inputs).text_embeds
        assert again(**inputs).text_embeds.equal(texts)
        torch.testing.assert_close(ours.model.encode_text(ours.tokenizer(list(COLOURS))), texts, atol=1e-6, rtol=0)


def test_wrong_inputs_are_refused_in_words(opened: Opened) -> None:
    ids = opened.processor.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="as many pictures"):
        opened.model(**ids, pixel_values=pixels, return_loss=True)
    with pytest.raises(ValueError, match="expected \\(B, 3, 16, 16\\)"):
        opened.model.get_image_features(torch.zeros(2, 3, 24, 24))
    with pytest.raises(ValueError, match="truncation=True"):
        opened.model.get_text_features(torch.ones(1, 30, dtype=torch.long))


def test_code_of_the_folder_needs_torch_and_transformers_alone(opened: Opened) -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    others = {"torch", "transformers"}
    for name in REMOTE_CODE:
        assert set(get_imports(opened.folder / name)) <= {*others, *sys.stdlib_module_names}
        assert set(get_relative_imports(opened.folder / name)) <= {"configuration_m2_encoder"}


def test_older_versions_are_refused_in_words(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.SimpleNamespace(__version__="4.57.6", PretrainedConfig=object)
    monkeypatch.setitem(sys.modules, "transformers", older)
    code = (opened.folder / REMOTE_CODE[0]).read_text(encoding="utf-8")
    with pytest.raises(ImportError, match=r"needs transformers>=5, installed is 4\.57\.6"):
        exec(compile(code, REMOTE_CODE[0], "exec"), {"__name__": "configuration"})


def test_ours_goes_on_reading_the_folder_and_noticing_edits(opened: Opened, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", small_config(vocab_size=3500))
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    assert content["projection_dim"] == 12
    content["preprocess"]["pictures"]["background"] = "black"
    config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another preprocess\.pictures\.background"):
        load(folder)
