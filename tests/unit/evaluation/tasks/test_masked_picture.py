"""The picture of masked objectives says what the model says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.pictures.masked import MaskedRow
from m2_encoder.evaluation.tasks import masked_picture
from m2_encoder.evaluation.tasks.base import EvaluationContext, RunFacts
from m2_encoder.evaluation.tasks.masked_picture import MaskedPicture, choose_rows, spell_bytes
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.runs.build import build_masking
from tests.support.training import make_tokenizer, tiny_config

SET = RetrievalSet(
    name="squares",
    keys=tuple(f"k{i}" for i in range(12)),
    images=(torch.arange(12 * 3 * 256).reshape(12, 3, 16, 16) % 251).to(torch.uint8),
    captions={"en": ("red apple",) * 11 + ("car",), "zh": ("红色的苹果",) * 11 + ("车",)},
)


class Knowing(MaskedLanguage):
    """Says the truth in place of every hidden word but the last of the caption."""

    def predict(self, passes: PiecePasses, table: Tensor) -> Tensor:
        masked = passes.batch.masked_text
        assert masked is not None
        ids = passes.text.ids.clone()
        for row in range(len(ids)):
            ids[row, int(masked.predicted[row].nonzero()[-1])] = passes.text.ids[0, 0]
        return ids


def draw(
    objectives: dict[str, Objective], path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path | None, list[MaskedRow]]:
    config = tiny_config(vocab_size=make_tokenizer().vocab_size)
    torch.manual_seed(0)
    model = M2Encoder(config)
    shown: list[MaskedRow] = []
    original = masked_picture.draw_masked_page

    def spied(path: Path, rows: list[MaskedRow], **words: str) -> Path:
        shown.extend(rows)
        return original(path, rows, **words)

    monkeypatch.setattr(masked_picture, "draw_masked_page", spied)
    for objective in objectives.values():
        objective.build(config)
    tokenizer = make_tokenizer()
    masking = build_masking(objectives, tokenizer, config)
    context = EvaluationContext(
        model, tokenizer, {"val": SET}, objectives=objectives, masking=masking, run=RunFacts("try", steps=3)
    )
    if not MaskedPicture().applies(context):
        return None, shown
    ((name, draw_it),) = MaskedPicture().measure(context).pictures.items()
    draw_it(path.with_name(name))
    return path.with_name(name), shown


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ("<0xE7><0xBB><0x83>习", "练习"),
        ("a <0xE7><0xE7><0x95><0x89> b", "a ?畉 b"),
        ("<0x41><0xE7>", "A?"),
        ("<0xZZ> plain 中文", "<0xZZ> plain 中文"),
    ],
)
def test_byte_pieces_are_spelt(pieces: str, shown: str) -> None:
    assert spell_bytes(pieces) == shown


def test_both_objectives_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = {"itc": ImageTextContrastive(), "cmlm": Knowing(), "cmim": MaskedImage(mask_ratio=0.5)}
    path, rows = draw(objectives, tmp_path / "masked.png", monkeypatch)
    assert path is not None
    with Image.open(path) as picture:
        assert picture.width > 1000
    assert len(rows) == 8
    tokenizer = make_tokenizer()
    for row in rows:
        assert list(row.pictures) == ["original", "hidden", "with 中文", "with English"]
        hidden = (row.pictures["hidden"] == 214).all(dim=0)
        assert int(hidden.sum()) == 2 * 64, "two of four patches of 8 x 8"
        for column in ("with 中文", "with English"):
            assert torch.equal(row.pictures[column][:, ~hidden], row.pictures["original"][:, ~hidden])
        assert list(row.captions) == ["zh", "en"]
        for caption in row.captions.values():
            kinds = [words.is_right for words in caption.words]
            assert False in kinds, "the last hidden word is said wrong"
            visible = "".join(words.text for words in caption.words if words.is_right is None).split()
            assert all(part in tokenizer.decode(tokenizer.encode(caption.text)) for part in visible)


def test_words_alone_need_no_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives: dict[str, Objective] = {"cmlm": MaskedLanguage()}
    _, rows = draw(objectives, tmp_path / "masked.png", monkeypatch)
    assert list(rows[0].pictures) == ["original"]
    assert rows[0].captions["en"].words
    patches: dict[str, Objective] = {"cmim": MaskedImage(masking="attentive", mask_ratio=0.5)}
    _, rows = draw(patches, tmp_path / "masked.png", monkeypatch)
    assert not rows[0].captions["en"].words


def test_nothing_masked_nothing_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives: dict[str, Objective] = {"itc": ImageTextContrastive(), "cmlm": MaskedLanguage(weight=0.0)}
    path, _ = draw(objectives, tmp_path / "masked.png", monkeypatch)
    assert path is None
    assert not (tmp_path / "masked.png").exists()


def test_captions_of_several_words_are_preferred() -> None:
    both = ("zh", "en")
    assert choose_rows(SET, 8) == (both, list(range(8)))
    assert choose_rows(SET, 3) == (both, [0, 3, 6])
    assert choose_rows(SET, 12) == (both, list(range(12))), "too few of them: any"


def test_images_with_captions_in_all_languages_are_preferred() -> None:
    english = ("red apple",) * 6 + ((),) * 6
    assert choose_rows(SET._replace(captions={**SET.captions, "en": english}), 3) == (("zh", "en"), [0, 2, 4])
    assert choose_rows(SET._replace(captions={"en": english}), 3) == (("en",), [0, 2, 4])
    apart = {"en": english, "zh": ((),) * 6 + ("红色的苹果",) * 6}
    assert choose_rows(SET._replace(captions=apart), 2) == (("zh",), [6, 9])
