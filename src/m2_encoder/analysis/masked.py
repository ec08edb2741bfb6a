"""What masked objectives of a run predict: hidden words beside several pictures, hidden patches beside captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from torch import Tensor, nn

from m2_encoder.analysis.recorded import RecordedRun
from m2_encoder.analysis.table import Table
from m2_encoder.checkpoints.formats import read_torch
from m2_encoder.data.masking.batch_masking import build_masking
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.masked import choose_shift
from m2_encoder.evaluation.tasks.base import EvaluationContext, RunFacts
from m2_encoder.evaluation.tasks.masked import ORDER, choose_objectives, make_batch, make_passes
from m2_encoder.evaluation.tasks.masked_picture import draw_patches, spell_bytes
from m2_encoder.objectives.base import LocalObjective
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, ImageTextBatch

PARTNERS: Final = ("right", "wrong", "none")
"""What a caption stands beside: its own picture, that of another image half the set away, or no picture at all."""

_KINDS: Final = (MaskedLanguage, MaskedImage, Captioning)
_BATCH_SIZE: Final = 64  # images

_Kind = TypeVar("_Kind", bound=LocalObjective)


def load_masked(
    run: RecordedRun, sets: Mapping[str, RetrievalSet], *, checkpoint: str | int = "last"
) -> EvaluationContext:
    """A run's model with the heads of its masked objectives, for evaluation tasks and the functions of this module.

    Args:
        run: with such an objective.
        sets: by name in tables, as `RecordedRun.read_set` reads them.
        checkpoint: which has the heads; an export has none.

    Raises:
        UserError: if no masked objective is in the run, or there is no such checkpoint.
    """
    loaded = run.load(checkpoint)
    from m2_encoder.runs.build import build_objectives  # loads Lightning, after `load` has done it quietly
    from m2_encoder.runs.opening import find_checkpoint

    path = find_checkpoint(run.folder, str(checkpoint))
    assert path is not None, "the model was loaded from it"
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer), "a checkpoint of an encoder has one"
    built = {name: o for name, o in build_objectives(run.config).items() if isinstance(o, _KINDS)}
    if not built:
        fix = "train with m2-train +experiment=emoji_full, or objective=[itc,cmlm,cmim]"
        raise UserError(f"{run.name}: none of its objectives hides words or patches; {fix}")
    state = cast("Mapping[str, Mapping[str, Tensor]]", read_torch(path))["state_dict"]
    for name, objective in built.items():
        objective.build(loaded.model.config)
        prefix = f"objectives.{name}."
        objective.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return EvaluationContext(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        sets=sets,
        objectives=built,
        masking=build_masking(built, loaded.tokenizer, loaded.model.config),
        run=RunFacts(name=run.name, steps=run.steps),
    )


def predict_words(context: EvaluationContext, dataset: RetrievalSet, rows: Sequence[int] | None = None) -> Table:
    """How likely hidden words are beside the right picture, a wrong one and none.

    A row per hidden word: of English between blanks, of Chinese a stretch of hidden characters. `image` is the row of
    the set and `other` that of the wrong picture; `caption` has hidden words in brackets; `right`, `wrong` and `none`
    are probabilities of the word, the product of those of its tokens, which are predicted at once; `says_right` and so
    on are what is likeliest. No picture means that the layers that see both see the caption alone.

    Args:
        context: of `load_masked`.
        dataset: with captions in both languages.
        rows: images; by default all.

    Raises:
        UserError: if no objective hides words, or there is but one picture.
    """
    objective, chosen = _choose(context, MaskedLanguage), list(range(len(dataset.keys)) if rows is None else rows)
    languages = [name for name in ORDER if name in dataset.languages]
    batch = make_batch(context, dataset, chosen, languages)
    shift = choose_shift(batch.identity)
    if shift is None:
        raise UserError("a wrong picture takes images of two things at least")
    found = []
    with evaluation_mode(context.model) as device:
        objective.to(device).eval()
        for start in range(0, len(chosen), _BATCH_SIZE):
            own = batch.rows(slice(start, start + _BATCH_SIZE))
            places = [(start + place + shift) % len(chosen) for place in range(len(own.keys))]
            for word in _words_of(context, objective, own, batch.images[places]):
                place = word.pop("row") // own.captions_per_image
                found.append({"image": chosen[start + place], "other": chosen[places[place]], **word})
    said = [f"says_{partner}" for partner in PARTNERS]
    return Table(["image", "other", "language", "caption", "word", "tokens", *PARTNERS, *said], found)


def _words_of(
    context: EvaluationContext, objective: MaskedLanguage, own: ImageTextBatch, others: Tensor
) -> Iterator[dict[str, Any]]:
    """Hidden words of a batch; `row` is the place of the caption."""
    tokenizer, table = context.tokenizer, context.encoder.text_embed.tokens.weight
    losses, said = {}, {}
    right = make_passes(context.encoder, own, {"it": objective})
    for partner in PARTNERS:
        passes = make_passes(context.encoder, own, {"it": objective})
        if partner == "wrong":
            passes = make_passes(context.encoder, own._replace(images=others), {"it": objective})
        elif partner == "none":
            passes.image_hidden = right.image_hidden[:, :0]
        logits = objective.head.logits(passes.masked_text, table).float()
        true = passes.text.ids[passes.hidden_tokens]
        losses[partner] = nn.functional.cross_entropy(logits, true, reduction="none").tolist()
        said[partner] = logits.argmax(1).tolist()
    hidden, ids = right.hidden_tokens.cpu(), right.text.ids.cpu()
    number = 0
    for row in range(len(ids)):
        places = hidden[row].nonzero()[:, 0].tolist()
        numbers = dict(zip(places, range(number, number + len(places)), strict=True))
        number += len(places)
        for word in _split_words(places, tokenizer.pieces(ids[row])):
            at = [numbers[place] for place in word]
            yield {
                "row": row,
                "language": LANGUAGES[int(own.language[row])],
                "caption": _bracket(ids[row].tolist(), places, tokenizer),
                "word": _spell(tokenizer.pieces(ids[row, word])),
                "tokens": len(word),
                **{partner: math.exp(-sum(losses[partner][each] for each in at)) for partner in PARTNERS},
                **{f"says_{p}": _spell(tokenizer.pieces([said[p][each] for each in at])) for p in PARTNERS},
            }


def _split_words(places: Sequence[int], pieces: Sequence[str]) -> list[list[int]]:
    """Hidden places by word: neighbours, apart where a piece begins with a blank."""
    words: list[list[int]] = []
    for place in places:
        if words and words[-1][-1] == place - 1 and not pieces[place].startswith("▁"):
            words[-1].append(place)
        else:
            words.append([place])
    return words


def _bracket(ids: Sequence[int], places: Sequence[int], tokenizer: SentencePieceTokenizer) -> str:
    """A caption with its hidden stretches in brackets."""
    shown = []
    for place, (number, piece) in enumerate(zip(ids, tokenizer.pieces(ids), strict=True)):
        if number in (tokenizer.cls_id, tokenizer.end_id):
            continue
        before, after = place in places and place - 1 not in places, place in places and place + 1 not in places
        start = "▁[" if piece.startswith("▁") else "["
        shown.append((start + piece.removeprefix("▁") if before else piece) + ("]" if after else ""))
    return _spell(shown)


def _spell(pieces: Sequence[str]) -> str:
    return spell_bytes("".join(pieces)).replace("▁", " ").strip()


def predict_patches(context: EvaluationContext, dataset: RetrievalSet, rows: Sequence[int]) -> dict[str, Tensor]:
    """Images, the same with hidden patches in grey, and with predictions in their place beside the captions.

    Predicted pixels take the mean and the contrast of the true patch, which are not predicted.

    Args:
        context: of `load_masked`.
        dataset: with captions in both languages.
        rows: images, b of them.

    Returns:
        (b, 3, S, S) uint8 each: `original`, `hidden`, `with 中文` and `with English`.

    Raises:
        UserError: if no objective hides patches.
    """
    objective = _choose(context, MaskedImage)
    languages = [name for name in ORDER if name in dataset.languages]
    with evaluation_mode(context.model) as device:
        objective.to(device).eval()
        passes = make_passes(context.encoder, make_batch(context, dataset, rows, languages), {"it": objective})
        drawn = draw_patches(objective, passes, context.encoder.config.patch_size, languages)
    return {"original": dataset.images[list(rows)], **{name: images.cpu() for name, images in drawn.items()}}


def _choose(context: EvaluationContext, kind: type[_Kind]) -> _Kind:
    for objective in choose_objectives(context, kind).values():
        if isinstance(objective, kind):
            return objective
    raise UserError(f"the run has no objective {kind.__name__}; it has {', '.join(context.objectives)}")
