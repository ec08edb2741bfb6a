"""Names, keys and values of any length and form: lines that a command prints are short, and say them as they are."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m2_encoder.cli import embed
from m2_encoder.cli.commands import EVALUATE, TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.config.output import lasting_output, say
from m2_encoder.curation.report import Report, format_report
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import check_source
from m2_encoder.data.inspect.survey import survey_source
from m2_encoder.errors import MAX_LINE
from m2_encoder.evaluation.embedding import Item
from m2_encoder.evaluation.tables import ResultRow, ResultTable, open_console, print_table
from m2_encoder.hub import LoadedModel
from m2_encoder.pictures import STANDARD
from m2_encoder.runs import start as run_start
from tests.support.data_commands import Start
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture) -> str:
    captured = capsys.readouterr()
    for stream in (captured.out, captured.err):
        assert max(map(len, stream.splitlines()), default=0) <= MAX_LINE
    return captured.out + captured.err


@pytest.mark.parametrize("command", ["check", "stats"])
def test_markup_is_printed_as_it_is(start: Start, tmp_path: Path, capsys: Capture, command: str) -> None:
    def described(number: int) -> dict[str, object]:
        return {"captions": {"en": ["[bold]a [/INST] cat"], "zh": [f"数字 {number}"]}, "[/INST]": 1, ":cat:": 1}

    members = [member for n in range(4) for member in make_sample(f"[/b]{n}", n, metadata=described(n))]
    write_tar(tmp_path / "[red]" / "[b].tar", [*members, ("[/x]bad.png", make_image(9)), ("[/x]bad.[/y]", b"x")])
    assert start(command, "./[red]", "workers=0", "full=true", "batch_size=2") == 0
    text = printed(capsys)
    for said in ("[/INST] 4", ":cat: 4", "[bold]a [/INST] cat", "[/x]bad", "[/y]", "\n./[red]\n"):
        assert said in f"\n{text}"


def test_long_keys_and_many_faults_stay_short(start: Start, tmp_path: Path, capsys: Capture) -> None:
    long = "k" * 100_000
    metadata = {"captions": {"en": ["w" * 100_000]}, long: 1, **{f"key{n}": n for n in range(1000)}}
    members = [member for n in range(3) for member in make_sample(f"{long}{n}", n, metadata=metadata)]
    members += make_sample("plain", 7)
    members += [(f"{long}bad{n}.{long}", b"x") for n in range(30)]
    write_tar(tmp_path / "tars" / "0.tar", members, form=tarfile.GNU_FORMAT)
    assert start("check", "tars", "workers=0", "full=true", "batch_size=2", "max_bad_share=1") == 0
    text = printed(capsys)
    assert "missing_image" in text
    assert len(text.splitlines()) < 80
    write_tar(tmp_path / "none" / "0.tar", members[8:], form=tarfile.GNU_FORMAT)
    assert start("check", "none", "workers=0", "full=true") == 2
    assert "no usable sample" in printed(capsys)


def test_many_problems_and_huge_values(start: Start, tmp_path: Path, capsys: Capture) -> None:
    write_numbers(tmp_path / "tars", [2])
    assert start("check", f"source={'x' * 100_000}") == 2
    assert "no such file" in printed(capsys)
    assert start("check", "tars", f"batch_size={'9' * 100_000}x") == 2
    assert "batch_size=" in printed(capsys)
    assert start("check", "tars", *(f"+{'u' * 1000}{n}=1" for n in range(100))) == 2
    text = printed(capsys)
    assert "100 problems" in text
    assert "… and 81 more" in text
    assert start("y" * 100_000) == 2
    assert "no such sub-command" in printed(capsys)
    assert run_command(TRAIN, [f"{'z' * 100_000}=[1"]) == 2
    printed(capsys)


def test_failures_of_packing_are_counted_not_listed(start: Start, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(2000):
        (tmp_path / "photos" / f"{number:04d}.jpg").write_bytes(b"")
    (tmp_path / "photos" / "good.png").write_bytes(make_image(1))
    (tmp_path / "photos" / "good.json").write_text(json.dumps({"caption": "a cat"}))
    assert start("pack", "photos", f"output={tmp_path / 'tars'}", "workers=0") == 1
    text = printed(capsys)
    assert "2,000 missing_caption" in text
    assert len(text.splitlines()) < 10


def test_a_path_that_no_disk_can_hold_is_refused(capsys: Capture) -> None:
    for line in (f"data={'x' * 3000}", f"model={'y' * 300}/z", f"data={'p/' * 3000}", f"output={'o' * 300}/x.json"):
        assert run_command(EVALUATE, [line] if line.startswith("model") else ["model=nowhere", line]) == 2
        assert "File name too long" in printed(capsys)


ESCAPE = "\x1b[31m"


def test_what_is_said_and_logged_is_short_and_plain(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    with lasting_output():
        say(f"{ESCAPE}a\r\n{'b' * 9999}", error=True)
        say(*(f"[red]{n}" for n in range(500)))
        logging.getLogger("m2_encoder.any").warning("%s and %d%%\n%s", ESCAPE + "k" * 5000, 7, "second")
        logging.getLogger("other").warning("%s", "o" * 600)
    out, err = capsys.readouterr()
    assert out.splitlines() == [*(f"[red]{n}" for n in range(19)), "… and 481 more"]
    assert err.startswith("\\x1b[31ma\\r\\nbbb")
    assert len(err) <= MAX_LINE + 1
    ours, others = caplog.messages
    first, second = ours.splitlines()
    assert first.startswith("\\x1b[31mkkk")
    assert first.endswith("kkk and 7%")
    assert (len(first), second, len(others)) == (MAX_LINE - 100, "second", 600)


def test_tables_of_many_sources_and_sets_are_cut(capsys: Capture, tmp_path: Path) -> None:
    shards = [str(path) for path in write_numbers(tmp_path, [3])]
    report = check_source(survey_source(shards, InspectionOptions(), workers=0), batch_size=2)
    report = report._replace(warnings=(f"{ESCAPE}odd {'w' * 600}",))
    reports = {f"{ESCAPE}[red]{'n' * 300}{number}": report for number in range(500)}
    console = open_console()
    console.print(run_start._table(reports))
    run_start._print_warnings(console, reports)
    text = printed(capsys)
    assert text.count("… and 481 more") == 2
    assert len(text.splitlines()) < 70
    assert ESCAPE not in text
    rows = [ResultRow(f"{ESCAPE}set {number}", [f"{number}.0"]) for number in range(40)]
    names = {row.split: row.split + "[/red]" * 500 for row in rows}
    print_table(console, ResultTable("title", ["mean"], rows), num_images=dict.fromkeys(names, 3), titles=names)
    text = printed(capsys)
    assert "… and 21 more" in text
    assert ESCAPE not in text


def test_reports_of_curation_are_cut_on_a_terminal_alone() -> None:
    reasons = {"kept": 5, "rewrite": 2, **{f"reason {n:04d}": 1 for n in range(1000)}}
    source = {
        "languages": {"zh": reasons, **{f"x{n}": {"language": 1} for n in range(300)}},
        "faults": [{"reason": "not_a_tar", "shard": f"{n}.tar"} for n in range(100)],
    }
    total = {"samples": 9, "kept_samples": 5, "pairs": 1305, "kept_pairs": 5, "rewrite": 2}
    report = Report({"total": total, "sources": {f"source{n}": source for n in range(30)}})
    lines = format_report(report, limit=20)
    assert lines[-1] == "… and 10 more sources in report.md"
    first = lines[: lines.index("### source1")]
    assert sum(line.startswith("|") for line in first) == 22  # two lines of header
    assert sum(line.startswith("- ") for line in first) == 19
    (rest,) = (line for line in first if "more reasons" in line)
    assert [cell.strip() for cell in rest.strip("|").split("|")][:4] == ["985 more reasons", "985", "0", "985"]
    (everything,) = (line for line in first if "*all*" in line)
    assert [cell.strip() for cell in everything.strip("|").split("|")][1:4] == ["1,005", "300", "1,305"]
    assert len(format_report(report)) > 30 * 1100


def test_embedding_thousands_of_unreadable_files_lists_twenty(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Item(n, f"{ESCAPE}[red]{n}{'n' * 230}.jpg", tmp_path, "unreadable" * 100) for n in range(10_000)]
    found.append(Item(10_000, "good.png", tmp_path))
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(embed, "list_images", lambda folder: found)
    shape = SimpleNamespace(feature_dim=2, to_dict=dict)
    transform = SimpleNamespace(to_uint8=lambda _: torch.zeros(3, 2, 2, dtype=torch.uint8), pictures=STANDARD)
    model = _Model(shape)
    monkeypatch.setattr(embed, "load_from", lambda cfg: LoadedModel(model, transform, None))  # type: ignore[arg-type]
    cfg = {"images": str(tmp_path / "images"), "texts": None, "output": str(tmp_path / "f.safetensors"), "model": "m"}
    cfg |= {"weights": str(tmp_path / "w.bin"), "batch_size": 4096, "num_workers": 0, "overwrite": False}  # type: ignore[dict-item]
    assert embed.run_embed(cfg) == 1
    lines = printed(capsys).replace("\r", "\n").splitlines()
    start_of_list = lines.index("m2-embed: 10,000 skipped:")
    assert len(lines[start_of_list + 1 :]) == 20
    assert lines[-1] == "… and 9,981 more"


class _Model(torch.nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), 2)


def test_a_split_of_many_languages_names_some(start: Start, tmp_path: Path, capsys: Capture) -> None:
    def described(number: int) -> dict[str, object]:
        return {"captions": {"en": [f"number {number}"], f"{ESCAPE}x{number}": [f"text {number}"]}}

    members = [member for n in range(60) for member in make_sample(f"{n}", n, metadata=described(n))]
    write_tar(tmp_path / "tars" / "0.tar", members)
    assert start("split", "tars", "output=sides", "workers=0", "near_images=null", "val=0.05") == 0
    text = printed(capsys)
    assert "    captions: 57 en on 57 samples; others: 1 caption in" in text
    assert text.count("val has no caption in") == 1
    assert "47 others" in text
    assert ESCAPE not in text
