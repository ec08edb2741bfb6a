"""Models of other libraries, opened from folders that these write, against their own calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import ImageError, UserError
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.feature_file import open_feature_file
from m2_encoder.evaluation.models import base, transformers_model
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.pictures import OFFICIAL
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config
from tests.support.once import build_once
from tests.support.peer_models import TEXTS, picture, png, save_open_clip, save_transformers
from tests.support.ranks import run_ranks
from tests.support.remote_code import code_apart

KINDS = ("clip", "metaclip_2", "siglip", "siglip2", "chinese_clip")

LENGTHS = {"clip": 24, "metaclip_2": 24, "chinese_clip": 52}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the libraries


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")

    def build(kind: str) -> Path:
        save = save_open_clip if kind == "open_clip" else lambda folder: save_transformers(folder, kind)
        return build_once(tmp_path_factory, f"peer-{kind}", save)

    return build


def features_of(opened: Any) -> tuple[Tensor, Tensor]:
    images = torch.stack([opened.preprocess(png(number)) for number in range(3)])
    texts = encode_texts(opened.model, TEXTS, opened.tokenizer, batch_size=3)
    return encode_images(opened.model, images, batch_size=2), texts


def own_call_of_transformers(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    """As the pages of the models on the hub say it, one picture and one text at a time."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    fixed = {"padding": "max_length", "max_length": 64} if "siglip" in kind else {}
    length = LENGTHS.get(kind, 64)
    with torch.no_grad():
        images = [model.get_image_features(**processor(images=picture(n), return_tensors="pt")) for n in range(3)]
        texts = [
            model.get_text_features(
                **tokenizer(
                    text.lower() if "siglip" in kind else text,
                    **{"truncation": True, "max_length": length, "return_tensors": "pt", **fixed},
                )
            )
            for text in TEXTS
        ]
    rows = [[made if isinstance(made, Tensor) else made.pooler_output for made in side] for side in (images, texts)]
    return functional.normalize(torch.cat(rows[0]), dim=-1), functional.normalize(torch.cat(rows[1]), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(folders: Callable[[str], Path], kind: str) -> None:
    opened = open_model(f"hf:{folders(kind)}")
    expected = own_call_of_transformers(folders(kind), kind)
    for ours, theirs in zip(features_of(opened), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert opened.facts.embed_dim == expected[0].shape[1]
    assert opened.facts.context_length == LENGTHS.get(kind, 64)
    assert opened.tokenizer(["cat", "a cat"]).mask.all().item() == ("siglip" in kind)


def test_features_are_those_of_open_clip(folders: Callable[[str], Path]) -> None:
    import open_clip

    folder = folders("open_clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(picture(n)) for n in range(3)]), normalize=True)
        texts = model.encode_text(tokenize(list(TEXTS)), normalize=True)
    opened = open_model(folder)  # recognised by its files
    for ours, theirs in zip(features_of(opened), (images, texts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert opened.facts.kind == "open_clip"
    assert opened.facts.weight_bytes == (folder / "open_clip_model.safetensors").stat().st_size
    assert opened.facts.preprocessing["mean"] == [0.4, 0.5, 0.6]


def test_architecture_of_open_clip_takes_a_checkpoint(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    folder, weights = folders("open_clip"), tmp_path / "weights.safetensors"
    content = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    (tmp_path / "tiny-test.json").write_text(json.dumps(content))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    shutil.copy(folder / "open_clip_model.safetensors", weights)
    opened = open_model("open_clip:tiny-test", weights=str(weights))
    assert opened.name == "tiny-test"
    assert torch.equal(features_of(opened)[1], features_of(open_model(folder))[1])
    assert opened.fingerprint == open_model(f"open_clip:tiny-test:{weights}").fingerprint
    assert opened.fingerprint != open_model(folder).fingerprint  # whose pictures have another mean
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="open_clip:tiny-test cannot be opened"):
        open_model("open_clip:tiny-test", weights=str(weights))


def test_large_pictures_get_more_patches_where_the_family_says_so(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_model(folders("siglip2"))  # at most 12 patches of 8 pixels
    family = transformers_model._FIXED._replace(budgets=(4, 12, 20))
    monkeypatch.setattr(transformers_model, "_FAMILIES", {"siglip2": family})
    opened = open_model(folders("siglip2"))
    small, middle, large = picture(1, size=(16, 16)), picture(2, size=(24, 24)), picture(3, size=(40, 40))
    pixels = torch.stack([opened.preprocess(image) for image in (small, middle, large)])
    assert pixels[:, -1, :2].prod(dim=1).tolist() == [4, 9, 16]
    features = encode_images(opened.model, pixels)
    torch.testing.assert_close(
        features[1], encode_images(plain.model, plain.preprocess(middle)[None])[0], atol=1e-6, rtol=0
    )
    assert opened.fingerprint != plain.fingerprint


def test_picture_that_a_transform_refuses_is_no_picture(tmp_path: Path) -> None:
    def refuse(image: Any) -> Tensor:
        raise ValueError(f"height {image.height} is too small")

    with pytest.raises(ImageError, match=r"of 40 x 1 pixels, which the model's transform refuses: height 1 is too"):
        base.PeerTransform(refuse, OFFICIAL)(picture(1, size=(40, 1)))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_ids(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["y"], vocab["z"] = vocab["z"], vocab["y"]  # in no probe of ours alone


def test_fingerprint_tells_weights_preprocessing_and_tokenizer_apart(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def fingerprint(edit: Callable[[Path], object]) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders("clip"), folder)
        edit(folder)
        return open_model(f"hf:{folder}").fingerprint

    def change_weights(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["visual_projection.weight"][0, 0] += 1e-3
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    processor = next(
        name for name in ("preprocessor_config.json", "processor_config.json") if (folders("clip") / name).is_file()
    )
    found = [
        fingerprint(lambda folder: None),
        fingerprint(change_weights),
        fingerprint(lambda folder: edit_json(folder / processor, lambda content: content.update(resample=2))),
        fingerprint(lambda folder: edit_json(folder / "tokenizer.json", swap_ids)),
        fingerprint(
            lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(hidden_act="gelu"))
        ),
    ]
    assert len(set(found)) == 5
    assert fingerprint(lambda folder: None) == found[0]  # whatever the folder is called


def test_sentence_transformers_folder_is_the_model_inside(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("clip"), tmp_path / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    opened = open_model(tmp_path, name="st")
    assert (opened.name, opened.facts.kind) == ("st", "sentence-transformers")
    assert opened.fingerprint == open_model(f"hf:{folders('clip')}").fingerprint
    modules.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="CLIPModel, Dense; expected"):
        open_model(tmp_path)


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own_pictures"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(3, 5)
        self.post_init()

    def get_image_features(self, pixel_values):
        return self.head(pixel_values.mean(dim=(2, 3)))
"""


def test_code_of_a_model_runs_only_if_trusted(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(folders("clip"), folder)
    (folder / "code.py").write_text(CODE)
    auto_map = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}  # as FG-CLIP 2's
    (folder / "config.json").write_text(json.dumps({"model_type": "own_pictures", "auto_map": auto_map}))
    save_file(
        {"head.weight": torch.rand(5, 3), "head.bias": torch.rand(5)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"brings code of its own.*trust=true"):
        open_model(folder)
    with code_apart(tmp_path / "cache"):
        opened = open_model(folder, trust=True)
    assert (opened.facts.embed_dim, opened.facts.context_length) == (5, 0)
    with pytest.raises(UserError, match=r"^own: OwnModel has no get_text_features, so no text tower"):
        opened.require_texts()


def test_incomplete_models_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders("clip"), folder)
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack 1 tensors: text_projection.weight"):
        open_model(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="its model cannot be opened"):
        open_model(folder)
    for spec, said in (
        ("open_clip:ViT-Q-99", "neither a name of open_clip"),
        ("open_clip:ViT-B-32", "has no weights; add one of its tags .*laion2b_s34b_b79k.* or a file"),
        ("open_clip:ViT-B-32:nothing.pt", "nothing.pt is no file"),
        ("hf:", "names nothing after hf:"),
        ("features:a.npy,b.npy,c.npy", "names 3 files"),
        (f"features:{tmp_path}/a.npy", "no such file"),
        (f"{tmp_path}/nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=said):
            open_model(spec)
    with pytest.raises(UserError, match=r"tokenizer=sp.model: is for models of this project"):
        open_model(f"hf:{folder}", tokenizer="sp.model")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package transformers; install it with .*m2-encoder\[peers\]"):
        open_model(f"hf:{folder}")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=12)
    model: M2Encoder = random_model(small_config(vocab_size=tokenizer.vocab_size))
    return export_model(tmp_path_factory.mktemp("run") / "export", model=model, tokenizer=tokenizer)


def fingerprint_elsewhere(_rank: int, spec: str) -> str:
    return open_model(spec).fingerprint


def test_own_model_is_what_load_opens(export: Path, tmp_path: Path) -> None:
    opened, loaded = open_model(export), load(export)
    images = torch.stack([loaded.preprocess(picture(number)) for number in range(3)])
    expected = encode_images(loaded.model, images), encode_texts(loaded.model, TEXTS, loaded.tokenizer)
    for ours, theirs in zip(features_of(opened), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (opened.facts.context_length, opened.facts.embed_dim, opened.facts.image_size) == (12, 12, 16)
    assert opened.facts.weight_bytes == (export / "model.safetensors").stat().st_size
    assert open_model(export.parent).name == export.parent.name  # the run's
    assert run_ranks(fingerprint_elsewhere, 1, str(export), folder=tmp_path) == [opened.fingerprint]
    assert open_model(export, pictures="official").fingerprint != opened.fingerprint
    weights = tmp_path / "tiny.safetensors"
    save_file(M2Encoder(M2EncoderConfig.from_name("tiny")).state_dict(), weights)
    without = open_model("tiny", weights=str(weights))
    with pytest.raises(UserError, match=r"^tiny: it was opened without a tokenizer; add tokenizer=FILE"):
        without.require_texts()


@pytest.mark.slow
def test_fingerprints_of_peers_are_those_of_another_process(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("open_clip", *KINDS):
        (tmp_path / kind).mkdir()
        found = run_ranks(fingerprint_elsewhere, 1, str(folders(kind)), folder=tmp_path / kind)
        assert found == [open_model(folders(kind)).fingerprint], kind


def test_features_of_files_are_looked_up_by_name(tmp_path: Path) -> None:
    import numpy as np

    features = torch.randn(3, 4)
    for suffix in (".safetensors", ".npz", ".npy"):
        path = tmp_path / f"pictures{suffix}"
        names = ["a/1.png", "b.png", "猫.png"]
        if suffix == ".safetensors":
            with open_feature_file(path, feature_dim=4, provenance={}) as add:
                add(torch.arange(3), names, features)
        elif suffix == ".npz":
            np.savez(path, features=features.numpy(), names=np.array(names))
        else:
            np.save(path, features.numpy())
            path.with_suffix(".txt").write_text("\n".join(names) + "\n")
        opened = open_model(f"features:{path},{path}")
        assert opened.table is not None
        found = opened.table.pictures.look_up(["猫.png", "a/1.png"], "pictures")
        torch.testing.assert_close(found, functional.normalize(features[[2, 0]], dim=-1))
        with pytest.raises(UserError, match=r"lacks 1 of 2 pictures: c.png; it holds 3, such as a/1.png, b.png"):
            opened.table.pictures.look_up(["c.png", "b.png"], "pictures")
    assert open_model(f"features:{tmp_path / 'pictures.npz'}").no_texts
    np.savez(tmp_path / "broken.npz", features=np.array([[1.0, np.nan]]), names=np.array(["x"]))
    np.savez(tmp_path / "twice.npz", features=np.eye(2), names=np.array(["x", "x"]))
    np.savez(tmp_path / "other.npz", vectors=np.eye(2))
    (tmp_path / "text.npy").write_text("no array")
    for name, said in (
        ("broken.npz", "not finite: x"),
        ("twice.npz", "two different features are called 'x'"),
        ("other.npz", "expected the arrays features and names, found vectors"),
        ("text.npy", "is no .npy of numbers"),
    ):
        with pytest.raises(UserError, match=said):
            open_model(f"features:{tmp_path / name}")
