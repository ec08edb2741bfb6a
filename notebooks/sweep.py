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
# # A sweep: which factors matter, and what cannot be told apart
#
# A sweep trains one run per combination of settings, each with several seeds. A seed decides the weights at the start
# and the order of the data: what it changes is chance. This notebook shows what each factor does, beside what chance
# does, and says where the two cannot be told apart.
#
# `runs_pattern` is what it reads: the folder of a sweep, a folder of runs, or a pattern such as `outputs/lr-*`.

# %% tags=["parameters"]
runs_pattern = "outputs/multirun/sweep-emoji"  # made by `make sweep`

# %%
import statistics

import matplotlib.pyplot as plt

from m2_encoder.analysis import INK, MUTED, plot_effects, read_runs, use_style

use_style()
found = read_runs(runs_pattern)
runs = found.finished
seeds = {run.settings["seed"] for run in runs}
print(f"{len(found)} runs, {len(runs)} of them finished; {len(seeds)} seeds")
print("what varies:", ", ".join(runs.factors) or "nothing but the seed")
runs.table(*runs.validation_recalls)

# %% [markdown]
# ## Everything at a glance
#
# The score of a run is its mean recall on the validation sets, over languages, in percent. Each dot is a run; lines go
# through means. The lower row shows pairs of factors: lines that are not parallel mean that one factor changes what
# the other one does.

# %%
plot_effects(runs)

# %% [markdown]
# ## What can be told apart
#
# Two levels of a factor are compared between runs that agree in everything else, the seed included. For each seed the
# differences are averaged; the bar is the 95 % interval of their mean over seeds (Student's t). A bar that reaches 0
# means that chance may be the reason.

# %%
differences = [each for each in runs.differences() if each.pairs][:20]
if not differences:
    print("No two runs differ in one factor alone, as in a search: combinations below are all there is to compare.")
figure, axes = plt.subplots(figsize=(8, 1.0 + 0.45 * max(1, len(differences))))
for place, each in enumerate(differences):
    color = "#0b5394" if each.is_told_apart else MUTED
    axes.errorbar(each.difference, place, xerr=each.interval, fmt="o", color=color, capsize=3)
axes.set_yticks(range(len(differences)), [each.title for each in differences])
axes.axvline(0, color=INK, linewidth=1)
axes.set(title="Difference of the score, points", ylim=(max(1, len(differences)) - 0.5, -0.5))
axes.grid(visible=True, axis="x")
axes.grid(visible=False, axis="y")
plt.show()

# %%
for each in differences:
    print(each)
apart = sum(each.is_told_apart for each in differences)
print(f"\n{apart} of {len(differences)} comparisons are told apart.", end=" ")
print(f"If no factor did anything, {0.05 * len(differences):.1f} of them would be expected to look like it.")

# %% [markdown]
# ## Which combination is best?
#
# All combinations (of many, the best 30), the best at the top. Dots are seeds, the line is their mean. Solid: cannot be
# told apart from the best one. Faint: worse than the best one by more than chance.

# %%
ranked = dict(list(runs.by_combination().items())[:30])
rivals = runs.rivals()
worse = {each.other for each in rivals if each.is_told_apart}
figure, axes = plt.subplots(figsize=(10, 1.0 + 0.36 * len(ranked)))
for place, (name, scores) in enumerate(ranked.items()):
    faint = 0.35 if name in worse else 1.0
    axes.plot(scores, [place] * len(scores), "o", color="#4aa3df", alpha=faint)
    axes.plot([statistics.fmean(scores)] * 2, [place - 0.3, place + 0.3], color="#0b5394", alpha=faint)
axes.set_yticks(range(len(ranked)), list(ranked))
axes.set(title="Score by combination, percent", ylim=(len(ranked) - 0.5, -0.5))
axes.grid(visible=True, axis="x")
axes.grid(visible=False, axis="y")
plt.show()

# %%
best, scores = next(iter(ranked.items()))
print(f"best: {best}, {statistics.fmean(scores):.2f} % over {len(scores)} seed(s)")
print(f"{len(rivals) - len(worse)} of the {len(rivals)} others cannot be told apart from it")

# %% [markdown]
# ## What this sweep could see
#
# How small a difference could have been told apart with these seeds, and about how many seeds it takes for one point:
# an interval shrinks with the root of their number.

# %%
for each in differences:
    if each.interval:
        print(
            f"{each.title:<40} below {each.interval:5.2f} points lost in chance; 1 point: {each.seeds_for(1.0)} seeds"
        )
if len(seeds) == 1:
    print("With one seed nothing can be told apart: add seeds, for example seed=0,1,2,3,4.")
