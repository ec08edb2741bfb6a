"""`m2-data tokenizer`: a SentencePiece model of the user's own captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from m2_encoder.bounds import Count, Paths, Text, Tokens
from m2_encoder.config.check import check_settings
from m2_encoder.config.model_choice import output_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, find_patterns
from m2_encoder.config.problems import Unset, find_problems
from m2_encoder.data.caption_source import CaptionSource
from m2_encoder.data.inspect.tables import make_table, print_titled
from m2_encoder.data.inspect.token_report import TokenReport, TokenSummary, count_tokens
from m2_encoder.data.samples.language import LanguageName, describe_languages, read_language
from m2_encoder.data.samples.parse import CaptionText
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import atomic_file
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.spaces import normalise_spaces
from m2_encoder.tokenizers.training import Chinese, Coverage, VocabSize, train_tokenizer
from m2_encoder.types import LANGUAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The keys of m2-data tokenizer; `conf/commands/data_tokenizer.yaml` says what they mean."""

    source: Paths
    output: Text
    vocab_size: VocabSize
    coverage: Coverage
    fold_case: bool
    chinese: Chinese
    max_captions: Count
    language: LanguageName | None
    context_length: Tokens
    overwrite: bool


def check_tokenizer(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data tokenizer; looks at names of files, not into them."""
    problems = [*check_settings(TokenizerSettings, cfg), *output_problems(cfg)]
    if problems or isinstance(cfg["source"], Unset):
        return problems
    try:
        CaptionSource(find_patterns(cfg["source"])).check()
    except UserError as error:
        return [problem._replace(key="source", value=cfg["source"]) for problem in find_problems(error)]
    return []


def run_tokenizer(cfg: dict[str, Any]) -> int:
    """Trains, writes the file and says what it makes of the captions.

    Raises:
        UserError: if the source has no captions, or the wrong number for so many pieces.
    """
    source = CaptionSource(find_patterns(cfg["source"]), language=cfg["language"] and read_language(cfg["language"]))
    captions = list(islice(source.read(), cfg["max_captions"] + 1))
    is_cut = len(captions) > cfg["max_captions"]
    captions = captions[: cfg["max_captions"]]
    if not captions:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.unusable.most_common(5)) or "it is empty"
        raise UserError(f"has no caption in {' or '.join(LANGUAGES)} ({reasons})", key="source", value=cfg["source"])
    content = train_tokenizer(
        (normalise_spaces(caption.text) for caption in captions),
        vocab_size=cfg["vocab_size"],
        coverage=float(cfg["coverage"]),
        fold_case=cfg["fold_case"],
        chinese=cfg["chinese"],
    )
    output = anchor(cfg["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        temporary.write_bytes(content)
    _print_report(cfg, output, captions, source, is_cut=is_cut)
    return 0


def _print_report(
    cfg: Mapping[str, Any], output: Path, captions: list[CaptionText], source: CaptionSource, *, is_cut: bool
) -> None:
    tokenizer = SentencePieceTokenizer(output, context_length=cfg["context_length"])
    lengths: dict[str, list[int]] = {}
    found: dict[str, TokenSummary] = {}
    for language in LANGUAGES:
        texts = [caption.text for caption in captions if caption.language == language]
        if texts:
            lengths[language], found[language] = count_tokens(texts, tokenizer)
    report = TokenReport(tokenizer.context_length, tokenizer.truncation_side, tokenizer.vocab_size, found)
    say(f"{output}")
    first = f" (the first ones; max_captions={cfg['max_captions']:,})" if is_cut else ""
    say(f"  {tokenizer.vocab_size:,} pieces from {len(captions):,} captions{first}")
    if source.left_out:
        say(f"  left out: {describe_languages(source.left_out)}, which are neither Chinese nor English")
    if source.unusable:
        reasons = ", ".join(f"{count:,} {name}" for name, count in source.unusable.most_common(5))
        say(f"  without a caption: {reasons}")
    table = make_table("language", "captions", "median", "95%", "longest", "cut", "bytes or unknown")
    for language, own in found.items():
        numbers = [f"{value:.0f}" for value in np.quantile(lengths[language], (0.5, 0.95, 1.0))]
        cut = f"{own.cut:,} ({own.cut / own.captions:.2%})"
        foreign = f"{own.foreign:,} ({own.foreign / max(1, own.tokens):.2%})"
        table.add_row(language, f"{own.captions:,}", *numbers, cut, foreign)
    held = f"a context of {report.context_length} holds {report.limit}, longer ones lose their {report.lost}"
    print_titled(open_console(), f"Tokens of a caption; {held}", table)
    say(f"use it: m2-train model.tokenizer={cfg['output']} model.vocab_size={tokenizer.vocab_size}")
    say("  with weights of another tokenizer also model.map_tokenizer=true")
