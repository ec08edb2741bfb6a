"""`m2-data stats`: tables and a picture of a source's languages, lengths, sizes and duplicates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from m2_encoder.bounds import Text
from m2_encoder.cli.data_check import SurveySettings, source_problems, survey, title_of, tokenizer_problems
from m2_encoder.config.check import check_settings
from m2_encoder.config.job import EXIT_USER_ERROR
from m2_encoder.config.model_choice import output_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import find_problems
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import check_source
from m2_encoder.data.inspect.statistics import REPETITION_CLASSES, Statistics, measure_statistics
from m2_encoder.data.inspect.tables import make_table, print_report, print_titled
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.tokenizers.sentencepiece_tokenizer import OFFICIAL_CONTEXT_LENGTH, SentencePieceTokenizer
from m2_encoder.tokenizers.words import count_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatsSettings(SurveySettings):
    """The keys of m2-data stats."""

    plot: Text | None
    font: Text | None


def check_stats(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data stats."""
    problems = check_settings(StatsSettings, cfg)
    problems += source_problems(cfg, problems)
    problems += output_problems(cfg)
    problems += tokenizer_problems(cfg, problems)
    if isinstance(cfg["font"], str) and not find_path(cfg["font"]).is_file():
        problems.append(Problem("font", cfg["font"], "no such file"))
    try:
        count_words("词", "zh")
    except UserError as error:
        problems += find_problems(error)
    return problems


def run_stats(cfg: dict[str, Any]) -> int:
    """Prints tables, writes numbers and draws the picture.

    Raises:
        UserError: if the source, the tokenizer or the font cannot be used, or a place cannot be written.
    """
    length = cfg["context_length"] or OFFICIAL_CONTEXT_LENGTH
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=length)  # unless another is named
    found = survey(cfg, InspectionOptions(words=True, tokenizer=tokenizer))
    report = check_source(found, batch_size=cfg["batch_size"])
    statistics = measure_statistics(found)
    console = open_console()
    print_report(console, report, title=title_of(cfg["source"]))
    if not report.usable:
        return EXIT_USER_ERROR
    assert report.tokens is not None, "a tokenizer was given"
    console.print()
    print_titled(console, "Distributions in what was read", _distribution_table(statistics))
    if cfg["output"] is not None:
        numbers = {"report": report.to_dict(), "statistics": statistics.to_dict()}
        write_json(Path(cfg["output"]).expanduser(), numbers, key="output")
    if cfg["plot"] is not None:
        # Here, because it loads matplotlib, which no other part of the command needs.
        from m2_encoder.data.inspect.figure import draw_statistics

        path = Path(cfg["plot"]).expanduser()
        font = None if cfg["font"] is None else find_path(cfg["font"])
        limit = report.tokens.limit
        draw_statistics(path, statistics, report, title=title_of(cfg["source"]), max_tokens=limit, font=font)
        say(f"plot: {path}")
    return 0


def _distribution_table(statistics: Statistics) -> Table:
    table = make_table("what", "share", "of")
    total = sum(statistics.sample_languages.values())
    for name, count in statistics.sample_languages.items():
        table.add_row(f"samples in {name}", f"{count / total:.2%}", "samples")
    for what, shares in statistics.repeated.items():
        for name, share in zip(REPETITION_CLASSES[1:], shares[1:], strict=True):
            if share:
                table.add_row(f"{what} that occur {name} times", f"{share:.2%}", what)
    return table
