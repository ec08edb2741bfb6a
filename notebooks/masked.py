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
# # Masked objectives: what is predicted, and from what
#
# Training can hide words of a caption and patches of a picture, and ask for them. What can the model tell? Does it look
# at the picture, or does it guess from the other words? Every hidden word is asked for three times: beside its own
# picture, beside a wrong one, and without any.

# %% tags=["parameters"]
run_folder = "outputs/emoji_full"  # made by `m2-train +experiment=emoji_full`
checkpoint = "last"  # the heads that predict are in checkpoints, not in an export
shown_set = None  # such as "val"; None for the first set that the run is evaluated on
every = 4  # takes every fourth picture of it

# %%
import math
import statistics
import textwrap

import matplotlib.pyplot as plt

from m2_encoder.analysis import (
    INK,
    LANGUAGE_COLORS,
    MUTED,
    PARTNERS,
    load_masked,
    predict_patches,
    predict_words,
    read_run,
    use_style,
)
from m2_encoder.evaluation.tasks.masked import Masked

use_style()
run = read_run(run_folder)
small, large = run.read_set(shown_set), run.read_set(shown_set, image_size=96)
captions = {language: texts[::every] for language, texts in small.captions.items()}
pictures = small._replace(keys=small.keys[::every], images=small.images[::every], captions=captions)
drawings = large.images[::every].permute(0, 2, 3, 1).numpy()  # larger, for people
context = load_masked(run, {"shown": pictures}, checkpoint=checkpoint)
print(f"{run.name}: {', '.join(context.objectives)}; {len(drawings):,} pictures of {pictures.name}")

# %% [markdown]
# ## How much is told?
#
# By objective: with the right partner, with that of another picture, and blind. Blind is always the commonest token, or
# the mean of every patch. Right over wrong is what the partner tells; wrong over blind is what the rest tells.

# %%
measured = Masked().measure_sets(context)["shown"]
figure, panels = plt.subplots(1, len(measured), figsize=(4.8 * max(2, len(measured)), 3), squeeze=False)
for axes, (name, by_language) in zip(panels.flat, measured.items(), strict=True):
    kind, scale = ("accuracy", 100) if "accuracy" in next(iter(by_language.values())) else ("loss", 1)
    keys = [kind, f"other_{kind}", "commonest_accuracy" if kind == "accuracy" else "mean_loss"]
    for place, (language, found) in enumerate(by_language.items()):
        heights = [scale * (found.get(key) or 0) for key in keys]
        spots = [each + 0.4 * (place - (len(by_language) - 1) / 2) for each in range(3)]
        bars = axes.bar(spots, heights, width=0.36, color=LANGUAGE_COLORS[language], label=language)
        axes.bar_label(bars, fmt="{:.1f}" if scale == 100 else "{:.2f}", fontsize=8, padding=2)
    axes.set_xticks(range(3), ["right partner", "another's", "blind"])
    axes.set_title(f"{name}: {'tokens told right, percent' if scale == 100 else 'loss, less is better'}")
    axes.margins(y=0.3)
    axes.legend(loc="upper right", ncols=2)
plt.show()

# %% [markdown]
# ## Hidden words: what does the picture add?
#
# A dot per hidden word: the probability of the true word beside its own picture, against that beside a wrong one, or
# beside none. On the line the picture makes no difference; above it, it helps. One bit is twice the probability.

# %%
words = predict_words(context, pictures)
figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True)
for axes, partner, title in zip(panels, PARTNERS[1:], ("beside a wrong picture", "without a picture"), strict=True):
    for language, color in LANGUAGE_COLORS.items():
        rows = [row for row in words if row["language"] == language]
        axes.plot(
            *([row[key] for row in rows] for key in (partner, "right")),
            "o",
            color=color,
            ms=3.5,
            alpha=0.4,
            mew=0,
            label=language,
        )
    axes.axline((0.1, 0.1), (1, 1), color=INK, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel=title, xlim=(1e-8, 1.5), ylim=(1e-8, 1.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
panels[0].set_title("Probability of the true word beside its own picture")
panels[0].legend(loc="upper left")
plt.show()

# %%
for language in LANGUAGE_COLORS:
    rows = [row for row in words if row["language"] == language]
    if rows:
        bits = [statistics.fmean(math.log2(row["right"] / row[other]) for row in rows) for other in PARTNERS[1:]]
        hits = [statistics.fmean(row[f"says_{partner}"] == row["word"] for row in rows) for partner in PARTNERS]
        told = ", ".join(f"{partner} {hit:.1%}" for partner, hit in zip(PARTNERS, hits, strict=True))
        print(f"{language}: {len(rows):,} words, told right beside these pictures: {told}")
        print(f"    its own picture adds {bits[0]:.2f} bits to a wrong one, {bits[1]:.2f} bits to none")

# %% [markdown]
# ## One by one
#
# The words to which the picture adds most, one of a picture: the caption with what is hidden in brackets, the
# probability of one hidden word in all three cases, and what the model holds to be likeliest.

# %%
telling = sorted(words, key=lambda row: row["right"] - row["wrong"])
chosen = []
for language in LANGUAGE_COLORS:
    spelled = [row for row in telling if row["language"] == language and any(map(str.isalpha, row["word"]))]
    by_image = {row["image"]: row for row in spelled}  # the last one stays, to which the picture adds most
    by_word = {row["word"]: row for row in spelled if by_image[row["image"]] is row}
    chosen += sorted(by_word.values(), key=telling.index, reverse=True)[:5]
most = 1.6 * max((row[partner] for row in chosen for partner in PARTNERS), default=1)
widths, size = [0.7, 0.7, 2, 3], (10, 1.15 * len(chosen))
figure, grid = plt.subplots(len(chosen), 4, figsize=size, squeeze=False, width_ratios=widths)
for line, row in zip(grid, chosen, strict=True):
    for axes, shown in zip(line, (row["image"], row["other"]), strict=False):
        axes.imshow(drawings[shown])
    for axes in line[:3]:
        axes.set_axis_off()
    fits = 12 if row["language"] == "zh" else 24
    place = {"transform": line[2].transAxes, "va": "center", "color": LANGUAGE_COLORS[row["language"]]}
    line[2].text(0.02, 0.12, f"asked: {row['word']}", **{**place, "color": MUTED}, fontsize=8.5)
    line[2].text(0.02, 0.6, "\n".join(textwrap.wrap(row["caption"], fits)[:3]), **place)
    bars = line[3].barh(range(3), [row[partner] for partner in PARTNERS], color=[INK, MUTED, "#c9d1d9"], height=0.7)
    said = [f" {row[partner]:.1%}  {row[f'says_{partner}'] or '(blank)'}" for partner in PARTNERS]
    line[3].bar_label(bars, said, fontsize=8)
    line[3].set(yticks=range(3), yticklabels=["own", "wrong", "none"], xlim=(0, most), xticks=[])
    line[3].tick_params(labelsize=8, length=0)
    line[3].invert_yaxis()
    line[3].grid(visible=False)
    line[3].spines[:].set_visible(False)
for place, title in enumerate(("own", "wrong", "caption, [hidden]", "probability of the word; what is said")):
    grid[0, place].set_title(title, fontsize=10)
plt.show()

# %% [markdown]
# ## Which words does a picture tell?
#
# Bits that its own picture adds to a wrong one, the mean over all places where a word is hidden; words that are hidden
# at least twice, the first and the last of them.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4.4))
for axes, (language, color) in zip(panels, LANGUAGE_COLORS.items(), strict=True):
    added = {}
    for row in words:
        if row["language"] == language:
            added.setdefault(row["word"], []).append(math.log2(row["right"] / row["wrong"]))
    means = sorted(((statistics.fmean(bits), word) for word, bits in added.items() if len(bits) > 1), reverse=True)
    shown = means if len(means) <= 16 else means[:11] + means[-5:]
    axes.barh([word for _, word in shown], [bits for bits, _ in shown], color=color, height=0.65)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(title=f"{language}: bits from the picture", xlabel=f"{len(means)} words")
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Hidden patches
#
# What the model sees, and what it draws into the grey beside each caption. Of pixels, mean and contrast of a patch are
# the true ones: only the pattern is predicted.

# %%
asked = list(range(len(drawings) // 16, len(drawings), max(1, len(drawings) // 7)))[:7]
predicted = predict_patches(context, pictures, asked)
figure, grid = plt.subplots(
    len(asked),
    len(predicted) + 1,
    figsize=(9, 1.3 * len(asked)),
    squeeze=False,
    width_ratios=len(predicted) * [1] + [2.2],
)
for number, (line, row) in enumerate(zip(grid, asked, strict=True)):
    for axes, (title, images) in zip(line, predicted.items(), strict=False):
        axes.imshow(images[number].permute(1, 2, 0))
        axes.set_title(title if number == 0 else "", loc="center", fontsize=10)
    for axes in line:
        axes.set_axis_off()
    for height, fits, (language, color) in zip((0.7, 0.3), (14, 30), LANGUAGE_COLORS.items(), strict=True):
        said = "\n".join(textwrap.wrap(pictures.captions_of(row, language)[0], fits)[:2])
        line[-1].text(0.04, height, said, va="center", color=color, fontsize=9, transform=line[-1].transAxes)
plt.show()
