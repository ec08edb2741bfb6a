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
# # One run: what it learned, how fast, and on what
#
# A run leaves a folder: its configuration, its curves, its final numbers. This notebook reads one and answers four
# questions. Did it learn? Would longer training have helped? Where did the time go? What was it trained on?
#
# `run_folder` below is what it reads: a folder that `m2-train` wrote. A run that is still at work can be read, too.

# %% tags=["parameters"]
run_folder = "outputs/emoji"  # made by `make train`

# %%
import statistics

import matplotlib.pyplot as plt

from m2_encoder.analysis import LANGUAGE_COLORS, MUTED, read_run, use_style

use_style()
run = read_run(run_folder)
run.facts

# %% [markdown]
# ## Did it learn?
#
# The loss of each objective on the batches that it was trained on. Thin: as logged. Thick: a running mean.

# %%
objectives = [name for name in run.config["objective"] if run.curves(f"train/loss/{name}")]
figure, panels = plt.subplots(1, max(1, len(objectives)), figsize=(4.2 * max(2, len(objectives)), 3.4), squeeze=False)
panels[0, 0].set_title("nothing has been logged yet")
for axes, name in zip(panels.flat, objectives, strict=False):
    by_language = {language: f"train/loss/{name}_{language}" for language in LANGUAGE_COLORS}
    shown = {key: run.curves(metric) for key, metric in by_language.items() if run.curves(metric)}
    for language, curves in (shown or {"both languages": run.curves(f"train/loss/{name}")}).items():
        (curve,) = curves.values()
        color = LANGUAGE_COLORS.get(language, MUTED)
        axes.plot(curve.samples, curve.values, color=color, linewidth=0.8, alpha=0.25)
        axes.plot(curve.samples, curve.smoothed(15).values, color=color, label=language)
    axes.set(title=f"{name}: loss in training", xlabel="pairs seen")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
plt.show()

# %% [markdown]
# ## Would longer training have helped?
#
# Recall on validation sets, measured during training: the mean of R@1, R@5 and R@10 in both directions. A ring marks
# the best value of each set.

# %%
validations = run.curves("val/*/mean_recall")
figure, axes = plt.subplots(figsize=(7.5, 3.6))
for metric, curve in validations.items():
    name = metric.removeprefix("val/").removesuffix("/mean_recall")
    color = LANGUAGE_COLORS.get(name.rpartition("_")[2])
    (line,) = axes.plot(curve.samples, curve.values, color=color, marker=".", label=name)
    best = max(range(len(curve.values)), key=curve.values.__getitem__)
    axes.plot(curve.samples[best], curve.values[best], "o", mfc="none", ms=11, mew=1.6, color=line.get_color())
axes.margins(y=0.15)
axes.set(title="Mean recall in validation, percent", xlabel="pairs seen", ylim=(0, None))
axes.xaxis.set_major_formatter("{x:,.0f}")
if validations:
    axes.legend(loc="lower right")
else:
    axes.text(0.5, 0.5, "no validation has been logged", ha="center", color=MUTED, transform=axes.transAxes)
plt.show()

# %%
for metric, curve in validations.items():
    top, place = max((value, place) for place, value in enumerate(curve.values))
    share = curve.samples[place] / max(1, run.samples_seen)
    rest = "at the end: more steps may help" if place == len(curve.values) - 1 else f"after {share:.0%} of the pairs"
    print(f"{metric.removesuffix('/mean_recall'):<24} best {top:5.1f} %, last {curve.values[-1]:5.1f} %; best {rest}")

# %% [markdown]
# ## What it knows at the end
#
# Recall on the evaluation sets. `chance` is what a random order reaches; t2i looks for the image of a text.

# %%
run.results

# %% [markdown]
# ## How fast was it?
#
# Pairs per second over all devices, without validations and checkpoints; the share of that time in which training
# waited for data; and what a sample costs in each stage of loading. A run of a few steps is too short to be measured.

# %%
figure, (speed, wait, load) = plt.subplots(1, 3, figsize=(12, 3.2))
for axes, metric, title, factor in (
    (speed, "perf/samples_per_s", "Pairs per second", 1),
    (wait, "perf/data_wait", "Waiting for data, % of the time", 100),
):
    axes.set(title=f"{title}: not measured", xlabel="pairs seen")
    for curve in run.curves(metric).values():
        axes.plot(curve.samples, [factor * value for value in curve.values], linewidth=1)
        middle = factor * statistics.median(curve.values)
        axes.axhline(middle, color=MUTED, linestyle="--", linewidth=1)
        axes.set_title(f"{title}: median {middle:,.0f}")
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
stages = {name.rpartition("/")[2]: curve.values for name, curve in run.curves("perf/load_ms/*").items()}
bars = load.barh(list(stages), [statistics.fmean(values) for values in stages.values()], height=0.55)
load.bar_label(bars, fmt=" {:.2f}")
load.set(title="Loading one sample, ms", xmargin=0.15, xticks=[])
load.spines["bottom"].set_visible(False)
load.grid(visible=False)
load.invert_yaxis()
plt.show()

# %% [markdown]
# ## Where did the time go?
#
# All of the wall time, by what it was spent on.

# %%
parts = {part: seconds for part, seconds in run.timing.items() if seconds >= 0.05}
total = sum(parts.values())
figure, axes = plt.subplots(figsize=(8, 0.5 + 0.42 * len(parts)))
bars = axes.barh(list(parts), list(parts.values()), height=0.6)
axes.bar_label(bars, [f" {seconds:,.1f} s · {seconds / total:.0%}" for seconds in parts.values()])
axes.set(title=f"{total:,.0f} seconds in all", xmargin=0.2, xticks=[])
axes.spines["bottom"].set_visible(False)
axes.grid(visible=False)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## What was it trained on?
#
# The languages of the captions that were drawn, and samples that could not be used and were replaced by others. A run
# on shards of your own (`data=webdataset`) has looked into its sources before the first step; the table shows them.

# %%
shares = {name.rpartition("/")[2]: statistics.fmean(curve.values) for name, curve in run.curves("data/share/*").items()}
skipped = {name.rpartition("/")[2]: round(curve.values[-1]) for name, curve in run.curves("data/skipped/*").items()}
print("captions:", ", ".join(f"{share:.1%} {language}" for language, share in shares.items()) or "no share was logged")
print("replaced:", ", ".join(f"{count:,} for {reason}" for reason, count in skipped.items()) or "no sample")
print(f"the data: {run.settings.get('data.folder') or ', '.join(run.sources.column('source') or ['not recorded'])}")
run.sources
