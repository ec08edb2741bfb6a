# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Groups: what they cost, and what they buy
#
# In grouped contrastive learning a rank takes its negatives from g ranks instead of from all (GBA-ITC), and may encode
# its rows in k micro-batches with one loss over all of them. Small groups send less and wait for fewer; large ones give
# a row more negatives. Three questions: what would it save on a cluster? Can that prediction be trusted? And what does
# the choice do to the model?
#
# The cluster, the model and the runs are parameters. `docs/grouped_itc.md` has the formulas.

# %% tags=["parameters"]
runs_pattern = "outputs/multirun/sweep-emoji"  # group sizes and micro-batches, made by `make sweep`
model = "m2_encoder_1b"
cluster = "a100_80g"  # an option of conf/cluster/hardware, or a file like those
ranks = 256
group_batch_size = 8192  # rows that a row is contrasted with, at least

# %%
import statistics

import matplotlib.pyplot as plt

from m2_encoder.analysis import (
    INK,
    MUTED,
    plan_training,
    read_benchmark,
    read_grouped_speedups,
    read_runs,
    tabulate_plans,
    use_style,
)
from m2_encoder.planning.communication import contrastive_bytes

use_style()
runs = read_runs(runs_pattern).finished
plan = plan_training(model=model, cluster=cluster, ranks=ranks, group_batch_size=group_batch_size)
tabulate_plans([*plan.best, *plan.baselines])

# %% [markdown]
# ## What would it save?
#
# The table has the fastest setting of each group size, then two losses over all ranks: `local_loss` is a good one,
# `full_logits` the plain one, where every rank computes all logits. Below, where a step's time goes.

# %%
shown = [*plan.best[:5], *plan.baselines]
names = [f"groups of {item.setting.group_size}" for item in plan.best[:5]] + [
    "all ranks, local loss",
    "all ranks, full logits",
]
figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(shown)))
left = [0.0] * len(shown)
for part in plan.best[0].time._fields:
    widths = [1e3 * getattr(item.time, part) for item in shown]
    if max(widths) > 0.005 * 1e3 * plan.best[0].time.total:
        axes.barh(names, widths, left=left, height=0.6, label=part.replace("_", " "))
    left = [start + width for start, width in zip(left, widths, strict=True)]
for place, total in enumerate(left):
    axes.text(total, place, f"  {total:,.0f} ms", va="center")
axes.set(title=f"A step of {model} on {ranks} ranks ({cluster}), ms", xmargin=0.12)
axes.grid(visible=True, axis="x")
axes.grid(visible=False, axis="y")
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
axes.invert_yaxis()
plt.show()

# %%
best, (good, plain) = plan.best[0], plan.baselines
for name, other in (("a good loss over all ranks", good), ("full logits on every rank", plain)):
    saved = 1 - best.time.total / other.time.total
    fits = "" if other.memory.total <= 1e9 * plan.request.memory_gb else " (which does not fit into memory)"
    print(f"Groups of {best.setting.group_size} save {saved:.1%} of a step against {name}{fits},")
    print(f"  and send {best.communication.bytes_sent / other.communication.bytes_sent:.1%} of its bytes for the loss.")

# %% [markdown]
# ## Can the prediction be trusted?
#
# `benchmarks/grouped_training.py` has measured steps of four ranks over links of chosen latency and bandwidth, and has
# asked the planner about the same links. On the diagonal both agree.

# %%
speedups = read_grouped_speedups()
shades = {1: "#0b4f9c", 2: "#4aa3df", 4: "#8a94a6"}
figure, (against, latency) = plt.subplots(1, 2, figsize=(11, 4.2))
for k, marker in ((1, "o"), (4, "s")):
    for g, color in shades.items():
        rows = [row for row in speedups if (row["group_size"], row["micro_batches"]) == (g, k)]
        planned, measured = ([row[name] for row in rows] for name in ("planned", "measured"))
        against.plot(planned, measured, marker, color=color, mfc=color if k == 1 else "none", label=f"g={g}, k={k}")
        fast = [row for row in rows if row["bandwidth"] == "unlimited" and k == 1]
        places = range(len(fast))
        latency.plot(places, [row["planned"] for row in fast], color=color)
        latency.plot(
            places, [row["measured"] for row in fast], "o", color=color, label=f"groups of {g}" if fast else None
        )
        latency.set_xticks(places, [f"{row['latency_ms']:g}" for row in fast]) if fast else None
against.axline((1, 1), slope=1, color=INK, linewidth=0.8)
against.set(title="Speed over full logits", xlabel="planned", ylabel="measured")
against.legend()
latency.axhline(1, color=INK, linewidth=0.8)
latency.set(title="Speed by latency: dots measured, lines planned", xlabel="latency of a link, one way, ms")
latency.legend()
plt.show()

# %%
for k in (1, 4):
    ratios = [row["planned"] / row["measured"] for row in speedups if row["micro_batches"] == k]
    off = [abs(ratio - 1) for ratio in ratios]
    lean = (
        "too good" if statistics.median(ratios) > 1.02 else "too bad" if statistics.median(ratios) < 0.98 else "right"
    )
    print(
        f"k={k}: the prediction is off by {statistics.median(off):.0%} in the middle, {max(off):.0%} at most;", end=" "
    )
    print(f"on the whole it is {lean}.")

# %% [markdown]
# ## Are the bytes right?
#
# `benchmarks/contrastive.py` counts what each of four ranks sends for the loss, 512 rows of 768 numbers in fp32. The
# formula: 2k(g−1)BEb bytes of features, 8k(g−1)B of logsumexps, and nothing in backward.

# %%
contrastive = read_benchmark("contrastive")
fixed = {"world_size": 4, "rows": 512, "feature_dim": 768, "bytes_per_element": 4}
for row in contrastive.rows:
    if str(row["candidate"]).startswith("ours, g = "):
        g = int(row["candidate"].rpartition(" ")[2])
        formula = contrastive_bytes("local_form", group_size=g, **fixed).bytes_sent / 1e6
        print(f"groups of {g}: {row['sent_mb']:6.3f} MB counted, {formula:6.3f} MB by formula;", end=" ")
        print(f"{row['median_ms']:4.0f} ms, {row['time_over_open_clip']:.2f} of what open_clip's local loss takes")
matches = "all as the formula says" if contrastive.figures["comm_matches_formula"] else "not all as the formula says"
print(f"{contrastive.figures['comm_settings_checked']} settings were counted, {matches}")

# %% [markdown]
# ## What does a group buy?
#
# Runs that see the same number of pairs, by group size and micro-batches: recall on the validation sets, and speed on
# the machine that trained them. Dots are runs, lines go through means; ± is the spread over seeds.

# %%
runs.table(*runs.validation_recalls, "perf/samples_per_s")

# %%
varied = [key for key in ("strategy.group_size", "strategy.micro_batches") if key in runs.factors]
figure, panels = plt.subplots(
    1, max(1, len(varied)), figsize=(4.5 * max(1, len(varied)), 3.6), sharey=True, squeeze=False
)
for axes, key in zip(panels.flat, varied, strict=False):
    scored = [(settings[key], score) for settings, score in runs.scored()]
    levels = sorted({level for level, _ in scored})
    means = [statistics.fmean(score for level, score in scored if level == each) for each in levels]
    axes.plot([levels.index(level) for level, _ in scored], [score for _, score in scored], "o", color="#9fb3c8")
    axes.plot(range(len(levels)), means, "o-", color="#0b5394")
    axes.set_xticks(range(len(levels)), levels)
    axes.set(title="Mean recall in validation, percent", xlabel=key, xlim=(-0.4, len(levels) - 0.6))
if not varied:
    panels[0, 0].text(0.5, 0.5, "these runs vary neither groups nor micro-batches", ha="center", color=MUTED)
plt.show()

# %%
for each in runs.differences():
    if each.factor in varied:
        print(each)
if "strategy.group_size" not in varied:
    print("Group sizes do not vary here: `make sweep` makes runs of which they do.")
