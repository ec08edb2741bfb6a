"""Training in groups over a slow network: four ranks, links of limited bandwidth and added latency.

Each rank is a process in a network namespace of its own (see _network.py); latency is one way, from rank to rank, and
bandwidth is a rank's, in each direction. Round trip and throughput are measured on the shaped links before anything
else and stand beside the nominal values. Needs root, `ip` and `tc`.

Compared on the tiny model, with the same rows per rank and optimizer step, DDP's gradient mean over all ranks, AdamW:

- full logits: open_clip's ClipLoss(local_loss=False, gather_with_grad=True), every rank computes all logits;
- local loss: ClipLoss(local_loss=True, gather_with_grad=True);
- local loss, fused gather: the same formula with one all-gather forward and one reduce-scatter backward, the best that
  a gather with gradient can do: the backward of torch's own costs one scatter per rank on gloo, which is not the
  loss's fault;
- ours for g = 4 (the same loss), 2 and 1 (fewer negatives: another objective), with k = 1, and with k = 4 pieces that
  are encoded twice, one of them alive at a time.

Candidates take turns within one set of processes; a step's time is that of the slowest rank, from a common start. The
loss alone, on given features, is timed as well: in training, every candidate sends the same gradients too, and on a
slow link these dominate. Four ranks share the processors of one machine: computing takes longer than on four machines,
for all candidates alike, and communication weighs less than it would beside faster computing.

An interrupted run with `--json PATH` goes on where it stopped: finished settings are kept in PATH.partial.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from _candidates import Candidate, list_candidates
from _common import Report, Timing, parse_arguments, speedup
from _journal import Journal
from _network import Link, Network, NetworkError
from _planned import Planner
from _rank import COPY_BYTES, MATMUL_SIDES
from _ranks import RankError, Ranks

WORLD_SIZE = 4
BANDWIDTHS_MBIT = (None, 1000.0, 100.0)
LATENCIES_MS = (0.0, 1.0, 5.0, 20.0)
QUICK_LINKS = (Link(0.0, None), Link(5.0, 1000.0))
# Rows per rank and feature width of the loss alone: the tiny model's own, and those of the 0.4B model at a usual batch.
LOSS_SHAPES = ((64, 128), (256, 768))
# Measured and planned speed over the baselines, by their method. The planner knows one gather with gradient.
COLUMNS = {"full": "over_full", "local": "over_local", "local_fused": "over_fused"}
PLANNED_COLUMNS = {"full": "planned_over_full", "local": "planned_over_local"}
# Largest difference between two candidates that compute the same objective, relative to the gradient's norm.
AGREEMENT = 1e-4


class PerSetting(dict[str, Any]):
    """A figure with one value per setting: whole in JSON, counted on the terminal, where the tables show it."""

    def __str__(self) -> str:
        return f"{len(self)} values, in the tables above"


# ------------------------------------------------------------------------------------------------------------ checks


def check_agreement(ranks: Ranks, candidates: Sequence[Candidate]) -> None:
    """Refuse to compare what does not compute the same: loss and gradient per objective (per g)."""
    reference: dict[int, tuple[str, float, dict[str, Any]]] = {}
    for candidate in candidates:
        answers = ranks.each([{"do": "gradient", "candidate": candidate.label}] * WORLD_SIZE)
        loss = statistics.fmean(answer["loss"] for answer in answers)
        label, first_loss, first = reference.setdefault(candidate.group_size, (candidate.label, loss, answers[0]))
        difference = max(abs(a - b) for a, b in zip(first["sums"], answers[0]["sums"], strict=True)) / first["norm"]
        if not max(abs(loss - first_loss) / first_loss, difference) < AGREEMENT:
            raise SystemExit(
                f"{candidate.label} and {label} disagree (loss {loss:.6f} and {first_loss:.6f}, gradients by "
                f"{difference:.1e} of their norm): the comparison means nothing"
            )


# ---------------------------------------------------------------------------------------------------------- measuring


def take_turns(work: Mapping[str, Callable[[], dict[str, float]]], *, rounds: int) -> dict[str, dict[str, Any]]:
    """Each candidate once per round, every second round backwards, after one round that is not counted.

    Returns:
        By label: `timing`, and the median bytes that a rank has sent as `sent`.
    """
    results: dict[str, list[dict[str, float]]] = {label: [] for label in work}
    order = list(work)
    for i in range(-1, rounds):
        for label in order if i % 2 == 0 else reversed(order):
            result = work[label]()
            if i >= 0:
                results[label].append(result)
    return {
        label: {
            "timing": Timing(tuple(result["seconds"] for result in found)),
            "sent": statistics.median(result["sent"] for result in found),
        }
        for label, found in results.items()
    }


def measure_network(network: Network, ranks: Ranks, link: Link, *, rounds: int) -> dict[str, Any]:
    """Shape the links, and find out what they really do."""
    network.shape(link)
    num_bytes = 100_000_000 if link.bandwidth_mbit is None else int(link.bandwidth_mbit * 1e6 / 8 * 0.3)
    orders: list[dict[str, Any]] = [{"do": "nothing"} for _ in range(WORLD_SIZE)]
    orders[0] = {"do": "probe", "peer": network.address(1), "bytes": num_bytes}
    orders[1] = {"do": "probe", "peer": "serve"}
    measured = ranks.each(orders)[0]
    work = {
        "one": partial(ranks.together, do="all_reduce", numbers=1),
        "gradient": partial(ranks.together, do="all_reduce", numbers=None),
    }
    reduced = take_turns(work, rounds=rounds)
    return {
        "what": link.label,
        "round_trip_ms": round(measured["round_trip_ms"], 3),
        "mbit_per_s": round(measured["mbit_per_s"]),
        "all_reduce_one_ms": round(1e3 * reduced["one"]["timing"].median, 2),
        "gradient_all_reduce_ms": round(1e3 * reduced["gradient"]["timing"].median, 1),
    }


def measure_constants(ranks: Ranks) -> dict[str, float]:
    """What a rank does while all others do the same, for the planner."""
    found = take_turns({name: partial(ranks.together, do=name) for name in ("copy", "matmul")}, rounds=7)
    return {
        "text_tokens": ranks.text_tokens,
        "copy_gb_per_s": 2 * COPY_BYTES / found["copy"]["timing"].median / 1e9,
        "matmul_tflops": 2 * math.prod(MATMUL_SIDES) / found["matmul"]["timing"].median / 1e12,
    }


def measure_training(ranks: Ranks, candidates: Sequence[Candidate], *, rows: int, rounds: int) -> dict[str, Any]:
    """Whole optimizer steps; rows by candidate."""
    work = {c.label: partial(ranks.together, do="train", candidate=c.label) for c in candidates}
    return summarize(take_turns(work, rounds=rounds), candidates, rows=rows)


def measure_loss(
    ranks: Ranks, candidates: Sequence[Candidate], *, shape: tuple[int, int], rounds: int
) -> dict[str, Any]:
    """Forward and backward of the loss on given features: what is left when encoder and gradients cost nothing."""
    # Pieces are the encoder's matter: the loss sees all rows at once whatever k is.
    chosen = [c for c in candidates if c.micro_batches == 1]
    work = {c.label: partial(ranks.together, do="loss", candidate=c.label, shape=shape) for c in chosen}
    return summarize(take_turns(work, rounds=rounds), chosen, rows=shape[0])


def summarize(results: Mapping[str, Any], candidates: Sequence[Candidate], *, rows: int) -> dict[str, Any]:
    """Times, samples per second, traffic and speed over the baselines, by candidate."""
    timings = {label: result["timing"] for label, result in results.items()}
    baselines = {COLUMNS[c.method]: timings[c.label] for c in candidates if c.method in COLUMNS}
    return {
        label: {
            **timing.row(),
            "samples_per_s": round(WORLD_SIZE * rows / timing.median, 1),
            "sent_mb": round(results[label]["sent"] / 1e6, 3),
            **{column: round(speedup(baseline, timing), 3) for column, baseline in baselines.items()},
        }
        for label, timing in timings.items()
    }


def count_retransmissions(ranks: Ranks) -> int:
    """TCP segments sent twice, by all ranks since the start."""
    return sum(answer["retransmitted"] for answer in ranks.each([{"do": "nothing"}] * WORLD_SIZE))


# --------------------------------------------------------------------------------------------------------------- main


def measure(arguments: Any, journal: Journal, candidates: Sequence[Candidate], links: Sequence[Link]) -> None:
    """Every setting that the journal lacks."""
    missing = [link for link in links if link.label not in journal.found]
    if not missing:
        return
    size = {"rows": arguments.rows, "threads": max(1, arguments.threads // WORLD_SIZE)}
    with Network(WORLD_SIZE) as network, Ranks(network, num_ranks=WORLD_SIZE, **size) as ranks:
        check_agreement(ranks, candidates)
        for link in missing:
            print(f"measuring {link.label} …", file=sys.stderr, flush=True)
            before = count_retransmissions(ranks)
            # Links that are slow are also steady, and cost the most.
            rounds = arguments.rounds if link.bandwidth_mbit is None else max(3, arguments.rounds - 2)
            entry = {
                "link": link.label,
                "network": measure_network(network, ranks, link, rounds=rounds),
                "constants": measure_constants(ranks),
                "training": measure_training(ranks, candidates, rows=arguments.rows, rounds=rounds),
                "losses": [measure_loss(ranks, candidates, shape=shape, rounds=rounds) for shape in LOSS_SHAPES],
            }
            refused, late_s = network.relay_errors()
            entry["network"] |= {
                "relay_late_ms": round(1e3 * late_s, 1),
                "relay_refused": refused,
                "segments_sent_twice": count_retransmissions(ranks) - before,
            }
            journal.add(link.label, entry)


def build_planner(entry: Mapping[str, Any], *, rows: int) -> Planner:
    """A planner that knows the machine from the setting without shaping."""
    own = next(c.label for c in list_candidates(WORLD_SIZE) if (c.method, c.group_size) == ("grouped", 1))
    step_s = entry["training"][own]["median_ms"] / 1e3
    return Planner(
        world_size=WORLD_SIZE, rows=rows, constants=entry["constants"], unshaped=entry["network"], step_s=step_s
    )


def add_planned(rows: dict[str, Any], candidates: Sequence[Candidate], seconds: Callable[[Candidate], float]) -> None:
    """Predicted speed over the baselines, beside the measured one."""
    planned = {c.method: seconds(c) for c in candidates if c.method in PLANNED_COLUMNS}
    for candidate in candidates:
        if candidate.label in rows:
            for method, column in PLANNED_COLUMNS.items():
                rows[candidate.label][column] = round(planned[method] / seconds(candidate), 3)


def fill(report: Report, entries: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate], *, rows: int) -> None:
    """Tables in the order of the settings, and figures by latency, bandwidth, g and k."""
    planner = build_planner(entries[0], rows=rows)
    report.rows += [entry["network"] for entry in entries]
    parts: dict[str, tuple[int, int] | None] = {"step": None, **{f"loss {r} x {e}": (r, e) for r, e in LOSS_SHAPES}}
    for i, (part, shape) in enumerate(parts.items()):
        for entry in entries:
            found = entry["training"] if shape is None else entry["losses"][i - 1]
            if shape is None:
                add_planned(found, candidates, partial(planner.step_s, link=entry["network"]))
            else:
                add_planned(found, candidates, partial(planner.loss_s, link=entry["network"], shape=shape))
            for candidate in candidates:
                if candidate.label in found:
                    row = found[candidate.label]
                    report.add(f"{entry['link']}: {part}, {candidate.label}", **row)
                    key = f"{entry['link']}, g={candidate.group_size}, k={candidate.micro_batches}"
                    for figure, columns in (("speedup", COLUMNS), ("planned", PLANNED_COLUMNS)):
                        if candidate.method == "grouped":
                            name = figure if shape is None else f"{figure} of {part}"
                            values = {method: row[column] for method, column in columns.items()}
                            report.figures.setdefault(name, PerSetting())[key] = values


def add_arguments(parser: Any) -> None:
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="per rank and step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each candidate (default: 5; quick: 3)")


def main() -> None:
    arguments = parse_arguments(__doc__, configure=add_arguments)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    if importlib.util.find_spec("open_clip") is None:
        print("the baselines need open_clip: pip install '.[benchmark]'", file=sys.stderr)
        raise SystemExit(2)
    candidates = list_candidates(WORLD_SIZE)
    links = QUICK_LINKS if arguments.quick else [Link(la, bw) for bw in BANDWIDTHS_MBIT for la in LATENCIES_MS]
    report = Report(f"training in groups, {WORLD_SIZE} ranks", distributions=("open_clip_torch",))
    unfinished = None if arguments.json is None else arguments.json.with_name(arguments.json.name + ".partial")
    identity = {"rows": arguments.rows, "rounds": arguments.rounds, "threads": arguments.threads}
    journal = Journal(unfinished, {**identity, **report.versions, "cpu": report.machine["cpu"]})
    try:
        measure(arguments, journal, candidates, links)
    except (NetworkError, RankError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, NetworkError) else 1) from None
    except KeyboardInterrupt:
        print("stopped; the same command with --json goes on with the next setting", file=sys.stderr)
        raise SystemExit(130) from None
    fill(report, [journal.found[link.label] for link in links], candidates, rows=arguments.rows)
    report.finish(json_path=arguments.json)
    journal.remove()


if __name__ == "__main__":
    main()
