"""`m2-data stats`: tables and a picture of a source's languages, lengths, sizes and duplicates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Final

from annotated_types import Ge
from rich.table import Table

from m2_encoder.bounds import Text
from m2_encoder.cli.data_check import SurveySettings, source_problems, survey, title_of
from m2_encoder.config.check import check_settings
from m2_encoder.config.command import EXIT_USER_ERROR
from m2_encoder.config.model_choice import find_path, output_problems
from m2_encoder.config.problems import find_problems
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import check_source
from m2_encoder.data.inspect.statistics import REPETITION_CLASSES, Statistics, measure_statistics
from m2_encoder.data.inspect.tables import make_table, print_report, print_titled
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.words import count_words

_TEMPLATE_TOKENS: Final = 2  # start and end, which a model reads beside those of the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatsSettings(SurveySettings):
    """The keys of m2-data stats."""

    tokenizer: Text | None
    context_length: Annotated[int, Ge(2)]
    plot: Text | None
    font: Text | None


def check_stats(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data stats."""
    problems = check_settings(StatsSettings, cfg)
    problems += source_problems(cfg, problems)
    problems += output_problems(cfg)
    for key in ("tokenizer", "font"):
        if isinstance(cfg[key], str) and not find_path(cfg[key]).is_file():
            problems.append(Problem(key, cfg[key], "no such file"))
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
    found = survey(cfg, InspectionOptions(words=True, tokenizer=_read_tokenizer(cfg["tokenizer"])))
    report = check_source(found, batch_size=cfg["batch_size"])
    statistics = measure_statistics(found)
    console = open_console()
    print_report(console, report, title=title_of(cfg["source"]))
    if not report.usable:
        return EXIT_USER_ERROR
    limit = cfg["context_length"] - _TEMPLATE_TOKENS
    print_titled(console, "\nDistributions in what was read", _distribution_table(statistics, limit))
    if cfg["output"] is not None:
        numbers = {"report": report.to_dict(), "statistics": statistics.to_dict()}
        write_json(Path(cfg["output"]).expanduser(), numbers, key="output")
    if cfg["plot"] is not None:
        # Here, because it loads matplotlib, which no other part of the command needs.
        from m2_encoder.data.inspect.figure import draw_statistics

        path = Path(cfg["plot"]).expanduser()
        font = None if cfg["font"] is None else find_path(cfg["font"])
        draw_statistics(path, statistics, report, title=title_of(cfg["source"]), max_tokens=limit, font=font)
        print(f"plot: {path}")
    return 0


def _read_tokenizer(name: str | None) -> bytes:
    if name is None:
        return load_emoji_tokenizer_model()
    try:
        content = find_path(name).read_bytes()
        SentencePieceTokenizer(content)  # says what is wrong with the file before any shard is read
    except (UserError, OSError) as error:
        raise UserError(str(error).removeprefix("tokenizer bytes: "), key="tokenizer", value=name) from error
    return content


def _distribution_table(statistics: Statistics, max_tokens: int) -> Table:
    table = make_table("what", "share", "of")
    total = sum(statistics.sample_languages.values())
    for name, count in statistics.sample_languages.items():
        table.add_row(f"samples in {name}", f"{count / total:.2%}", "samples")
    for language, histogram in statistics.lengths.get("tokens", {}).items():
        share = histogram.share_above(max_tokens)
        what = f"{language} captions of more than {max_tokens} tokens, which are cut"
        table.add_row(what, f"{share:.2%}", "captions")
    for what, shares in statistics.repeated.items():
        for name, share in zip(REPETITION_CLASSES[1:], shares[1:], strict=True):
            if share:
                table.add_row(f"{what} that occur {name} times", f"{share:.2%}", what)
    return table
