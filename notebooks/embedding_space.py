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
# # The space: where pictures, 中文 and English meet
#
# A model puts pictures and texts as points on one sphere. How near are the two captions of one picture? What stands
# next to a picture, and next to a word? Where does it fail, and what does the whole look like?

# %% tags=["parameters"]
run_folder = "outputs/emoji"  # made by `make train`
checkpoint = None  # of the run, such as "step=500"; None for its export
shown_set = None  # such as "val"; None for the first set that the run is evaluated on
words = ["红色的心", "red heart", "国旗", "flag", "笑脸", "smiling face", "猫", "cat"]

# %%
import textwrap

import matplotlib.pyplot as plt
import torch
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from m2_encoder.analysis import LANGUAGE_COLORS, MUTED, encode_set, encode_texts, evaluate_features, read_run, use_style

use_style()
run = read_run(run_folder)
model, preprocess, tokenizer = run.load(checkpoint)
pictures = run.read_set(shown_set)
rows = [
    row for row in range(len(pictures.keys)) if all(pictures.captions_of(row, language) for language in ("zh", "en"))
]
first = {language: [pictures.captions_of(row, language)[0] for row in rows] for language in ("zh", "en")}
drawings = run.read_set(shown_set, image_size=96).images[rows].permute(0, 2, 3, 1).numpy()  # larger, for people
space = encode_set(model, pictures, tokenizer)
recalls = [f"{language} {found['mean_recall']:.1f} %" for language, found in evaluate_features(space).items()]
print(f"{run.name}: {len(drawings):,} pictures of {pictures.name}, mean recall {', '.join(recalls)}")

# %% [markdown]
# ## Do the two languages say the same?
#
# Both captions of a picture should be near each other, nearer than captions of two pictures. And a Chinese caption
# should find its English one among all of them.

# %%
zh, en = (encode_texts(model, first[language], tokenizer) for language in ("zh", "en"))
image = space.image_features[rows]
off = ~torch.eye(len(image), dtype=torch.bool)
pairs = {"中文 and English": (zh, en), "picture and 中文": (image, zh), "picture and English": (image, en)}
figure, panels = plt.subplots(1, 3, figsize=(11, 2.9), sharex=True)
for axes, (title, (one, other)) in zip(panels, pairs.items(), strict=True):
    cosines = one @ other.T
    for values, color, label in ((cosines[off], "#b8c2cc", "of two pictures"), (cosines.diag(), "#0b5394", "of one")):
        axes.hist(values.numpy(), bins=60, density=True, color=color, alpha=0.8, label=label)
    axes.set(title=title, xlabel="cosine", yticks=[])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
panels[0].legend(loc="upper left")
plt.show()

# %%
for title, (one, other) in pairs.items():
    cosines = one @ other.T
    ranks = (cosines > cosines.diag()[:, None]).sum(dim=1) + 1
    print(f"{title:<20} cosine {cosines.diag().mean():.2f}, of two pictures {cosines[off].mean():.2f};", end=" ")
    print(f"rank 1 for {(ranks == 1).float().mean():.0%}, middle rank {int(ranks.median())} of {len(ranks):,}")

# %% [markdown]
# ## Is there a gap between pictures and texts?
#
# Contrastive models often keep pictures and texts in two narrow cones. The distance of their centres shows it: 0 where
# they are mixed, near 2 where they are opposite. Width: mean cosine of two points of one kind, 1 if all are the same.

# %%
centres = {"pictures": image.mean(0), "中文": zh.mean(0), "English": en.mean(0)}
for name, points in (("pictures", image), ("中文", zh), ("English", en)):
    gaps = ", ".join(
        f"{(points.mean(0) - centre).norm():.2f} to {other}" for other, centre in centres.items() if other != name
    )
    print(f"{name:<9} width {(points @ points.T)[off].mean():5.2f}; distance of centres {gaps}")

# %% [markdown]
# ## What stands next to a word?
#
# The nearest pictures of words that you choose, in both languages; above each its cosine and its own caption.

# %%
hits = (encode_texts(model, words, tokenizer) @ image.T).topk(6)
figure, grid = plt.subplots(len(words), 6, figsize=(9.5, 1.55 * len(words)), squeeze=False)
for line, word, scores, rows in zip(grid, words, hits.values.tolist(), hits.indices.tolist(), strict=True):
    language, fits = ("zh", 7) if any("\u4e00" <= letter <= "\u9fff" for letter in word) else ("en", 13)
    for axes, score, row in zip(line, scores, rows, strict=True):
        caption = first[language][row]
        caption = caption if len(caption) <= fits else f"{caption[: fits - 1]}…"
        axes.imshow(drawings[row])
        axes.set_axis_off()
        axes.set_title(f"{score:.2f} {caption}", fontsize=8, loc="center", pad=3)
    place = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
    line[0].text(-0.25, 0.5, textwrap.fill(word, 10), fontsize=12, color=LANGUAGE_COLORS[language], **place)
plt.show()

# %% [markdown]
# ## What stands next to a picture?
#
# A few pictures, at even distances in the set, with their nearest pictures and the nearest captions of all.

# %%
asked = range(len(image) // 12, len(image), max(1, len(image) // 6))
near = (image @ image.T - 2 * torch.eye(len(image))).topk(4).indices.tolist()
widths = [1, 0.15, 1, 1, 1, 1, 3.2]
figure, grid = plt.subplots(len(asked), 7, figsize=(10.5, 1.4 * len(asked)), squeeze=False, width_ratios=widths)
for line, row in zip(grid, asked, strict=True):
    for axes in line:
        axes.set_axis_off()
    for axes, shown in zip((line[0], *line[2:6]), (row, *near[row]), strict=True):
        axes.imshow(drawings[shown])
    line[6].set_box_aspect(1 / widths[6])
    for height, fits, (language, points) in zip((0.76, 0.3), (24, 44), (("zh", zh), ("en", en)), strict=True):
        nearest = (image[row] @ points.T).topk(min(12, len(points))).indices.tolist()
        said = " · ".join(list(dict.fromkeys(first[language][each] for each in nearest))[:3])
        place = {"transform": line[6].transAxes, "va": "center", "fontsize": 8.5, "color": LANGUAGE_COLORS[language]}
        line[6].text(0.02, height, "\n".join(textwrap.wrap(said, fits)[:3]), **place)
for place, title in ((0, "picture"), (2, "nearest pictures"), (6, "nearest captions")):
    grid[0, place].set_title(title)
plt.show()

# %% [markdown]
# ## Where does it fail?
#
# Captions whose own picture comes last of all: first that picture, then what the model holds to be nearer. Ask of each:
# is the caption, the drawing or the model to blame?

# %%
worst = []
for language, points in (("zh", zh), ("en", en)):
    cosines = points @ image.T
    ranks = (cosines > cosines.diag()[:, None]).sum(dim=1) + 1
    worst += [(language, row, int(ranks[row]), cosines[row]) for row in ranks.topk(4).indices.tolist()]
widths = [1.7, 1, 0.15, 1, 1, 1, 1]
figure, grid = plt.subplots(len(worst), 7, figsize=(9.5, 1.3 * len(worst)), squeeze=False, width_ratios=widths)
for line, (language, row, rank, cosines) in zip(grid, worst, strict=True):
    for axes in line:
        axes.set_axis_off()
    for axes, shown in zip((line[1], *line[3:]), (row, *cosines.topk(4).indices.tolist()), strict=True):
        axes.imshow(drawings[shown])
    said = "\n".join(textwrap.wrap(first[language][row], 11 if language == "zh" else 22)[:3])
    place = {"transform": line[0].transAxes, "va": "center"}
    line[0].text(0, 0.6, said, color=LANGUAGE_COLORS[language], fontsize=10, **place)
    line[0].text(0, 0.15, f"rank {rank:,} of {len(image):,}", color=MUTED, fontsize=8.5, **place)
for place, title in ((1, "its own"), (3, "what comes first")):
    grid[0, place].set_title(title)
plt.show()

# %% [markdown]
# ## A map
#
# The space has many directions; the two in which pictures differ most make a map (principal components). Neighbours on
# it are neighbours in the space only in part: the share of all differences that it shows stands above. Where two
# drawings would cover each other, one is left out.

# %%
centred = image - image.mean(0)
_, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
spread = centred @ directions[:2].T
even = spread.argsort(dim=0).argsort(dim=0) / len(spread)  # by order, so that the crowded middle gets room
places = (even + (spread - spread.amin(0)) / (spread.amax(0) - spread.amin(0))) / 2
taken = {}
for row, (x, y) in enumerate(places.tolist()):
    taken.setdefault((round(34 * x), round(25 * y)), row)
figure, axes = plt.subplots(figsize=(10.5, 8))
for (x, y), row in taken.items():
    thumbnail = OffsetImage(drawings[row], zoom=0.24)
    axes.add_artist(AnnotationBbox(thumbnail, (x / 34, y / 25), frameon=False))
share = float(strengths[:2].square().sum() / strengths.square().sum())
axes.set_title(f"{len(taken):,} of {len(image):,} pictures; the map shows {share:.0%} of their differences")
axes.set(xlim=(-0.03, 1.03), ylim=(-0.04, 1.04), xticks=[], yticks=[])
axes.grid(visible=False)
axes.spines[:].set_visible(False)
plt.show()
