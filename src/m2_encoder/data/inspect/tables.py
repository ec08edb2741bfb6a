"""Tables of a source report, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2_encoder.data.inspect.source_report import QUANTILES, CaptionSummary, SourceReport
from m2_encoder.data.inspect.token_report import TokenReport
from m2_encoder.errors import abridge

_QUANTILE_NAMES: Final = {0.0: "min", 0.5: "median", 1.0: "max"}
_MAX_TEXT: Final = 60
_MAX_NAME: Final = 40  # characters of a key or extension
_MAX_PLACE: Final = 120
_MAX_DETAIL: Final = 200
_MAX_KEYS: Final = 12


def print_report(console: Console, report: SourceReport, *, title: str) -> None:
    """Print everything that `m2-data check` found, the verdict last."""
    print_titled(console, title, _overview(report))
    if report.languages:
        print_titled(console, "Captions", length_table(report.languages))
    if report.tokens is not None and report.tokens.languages:
        tokens = report.tokens
        title = (
            f"Tokens of {tokens.vocab_size:,} pieces; a context of {tokens.context_length} holds {tokens.limit}, "
            f"longer captions lose their {tokens.lost} (truncation_side={tokens.truncation_side})"
        )
        print_titled(console, title, _token_table(tokens))
    if report.usable:
        print_titled(console, "Images", _image_table(report))
        print_titled(console, "Exact duplicates in what was read", _duplicate_table(report))
        expected = report.false_negatives
        console.print(
            f"False negatives to expect in a batch of {expected.batch_size:,}: {expected.per_row:.3g} per row; "
            f"{expected.share_of_rows:.2%} of the rows have one\n",
            highlight=False,
        )
    if report.frequent_captions:
        print_titled(console, "Most frequent captions", _frequent_table(report.frequent_captions))
    if report.faults:
        print_titled(console, "Faults", _fault_table(report))
    for warning in report.warnings:
        console.print(Text(abridge(f"warning: {warning}"), style="yellow"), soft_wrap=True)
    for problem in report.problems:
        console.print(Text(abridge(f"problem: {problem}"), style="bold red"), soft_wrap=True)
    if not report.problems:
        verdict = "nothing speaks against training on it" if not report.warnings else "usable, with these warnings"
        console.print(Text(verdict, style="green"))


def print_titled(console: Console, title: str, table: Table) -> None:
    """Print a table under its title, which a narrow table would fold."""
    console.print(Text(abridge(title), style="bold"), soft_wrap=True)
    console.print(table)


def length_table(languages: Mapping[str, CaptionSummary]) -> Table:
    """Lengths of captions by language, in every unit that was counted."""
    table = make_table("language", "captions", "samples", "length in", *_quantile_columns())
    for language, summary in languages.items():
        start = [language, f"{summary.captions:,}", f"{summary.samples:,}"]
        for unit in ("characters", "words", "tokens"):
            values = getattr(summary, unit)
            if values is not None:
                table.add_row(*start, unit, *_numbers(values))
                start = ["", "", ""]
    return table


def _token_table(report: TokenReport) -> Table:
    table = make_table("language", "captions", "cut", "tokens", "bytes or unknown", "captions with such")
    for language, own in report.languages.items():
        shares = (
            f"{count:,} ({count / max(1, total):.1%})"
            for count, total in ((own.foreign, own.tokens), (own.with_foreign, own.captions))
        )
        cut = f"{own.cut:,} ({own.cut / own.captions:.1%})"
        table.add_row(language, f"{own.captions:,}", cut, f"{own.tokens:,}", *shares)
    return table


def make_table(*columns: str) -> Table:
    """A table of numbers: the first column to the left, the others to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _overview(report: SourceReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    about = "" if report.is_whole else "about "
    table.add_row(
        "shards", f"{report.shards:,}, {report.num_bytes / 1e6:,.1f} MB; {report.inspected_shards:,} looked at"
    )
    table.add_row("usable samples", f"{about}{report.samples:,} ({report.usable_share:.2%} of those there)")
    table.add_row("read", f"{report.inspected:,} samples, {report.usable:,} of them usable")
    table.add_row("members", Text(_listing(report.extensions)))
    table.add_row("keys of JSON", Text(_listing(report.json_keys)))
    if report.effects:
        table.add_row("pictures", f"{_listing(report.effects)}, of {report.decoded:,} decoded")
    return table


def _image_table(report: SourceReport) -> Table:
    table = make_table("kinds", "pixels", *_quantile_columns())
    table.add_row(_listing(report.formats), "width", *_numbers(report.width))
    table.add_row("", "height", *_numbers(report.height))
    return table


def _duplicate_table(report: SourceReport) -> Table:
    table = make_table("", "total", "distinct", "repeated", "most often")
    for name, found in (("captions", report.captions), ("images", report.images)):
        table.add_row(name, f"{found.total:,}", f"{found.distinct:,}", f"{found.share:.2%}", f"{found.most:,}")
    return table


def _frequent_table(captions: Sequence[tuple[str, int]]) -> Table:
    table = make_table("times", "caption")
    table.columns[1].justify = "left"
    for text, count in captions:
        table.add_row(f"{count:,}", Text(abridge(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…")))
    return table


def _fault_table(report: SourceReport) -> Table:
    table = make_table("reason", "count", "for example")
    table.columns[2].justify = "left"
    table.columns[2].overflow = "fold"
    for reason, count in report.faults.items():
        example = next((fault for fault in report.examples if fault.reason == reason), None)
        place = "" if example is None else f"{Path(example.shard).name}:{example.key or ''}".rstrip(":")
        table.add_row(
            reason,
            f"{count:,}",
            Text("" if example is None else f"{abridge(place, _MAX_PLACE)}: {abridge(example.detail, _MAX_DETAIL)}"),
        )
    return table


def _quantile_columns() -> list[str]:
    return [_QUANTILE_NAMES.get(value, f"{value:.0%}") for value in QUANTILES]


def _numbers(values: Sequence[float]) -> list[str]:
    return [f"{value:,.0f}" for value in values]


def _listing(counts: Mapping[str, int]) -> str:
    shown = [f"{abridge(name, _MAX_NAME)} {count:,}" for name, count in list(counts.items())[:_MAX_KEYS]]
    more = f", and {len(counts) - _MAX_KEYS} more" if len(counts) > _MAX_KEYS else ""
    return ", ".join(shown) + more if shown else "none"
