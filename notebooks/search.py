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
# # From a checkpoint to search
#
# A trained model finds pictures by words in Chinese and English, by another picture, or by both at once. Ten cells:
# load it, encode pictures, ask, keep the features for next time.

# %% tags=["parameters"]
run_folder = "outputs/emoji"  # made by `make train`
checkpoint = "last"  # of the run, such as "step=500"; None for its export
pictures_folder = None  # of your pictures, an absolute path; None for a set of the run
shown_set = None  # which one, such as "val"
texts = ["红色的心", "a red heart", "国旗", "a flag", "水果", "fruit"]
# find a picture by the first, take the second away from it, add the third
mixed = [["闪亮的心", "红色", "蓝色"], ["tomato", "red", "green"], ["man health worker", "man", "woman"]]

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from m2_encoder.analysis import (
    LANGUAGE_COLORS,
    EvalTransform,
    encode_images,
    encode_texts,
    list_images,
    open_feature_file,
    read_features,
    read_run,
    use_style,
)

use_style()
run = read_run(run_folder)
model, preprocess, tokenizer = run.load(checkpoint)
print(f"{run.name} at {checkpoint or 'its export'}: {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Encode pictures
#
# A feature is a point on a sphere, so that a dot product is a cosine. `drawings` are for people, larger than what the
# model sees.

# %%
if pictures_folder is None:
    pictures, larger = run.read_set(shown_set), run.read_set(shown_set, image_size=96)
    names, seen, drawings = pictures.keys, pictures.images, larger.images
else:
    files = [item for item in list_images(Path(pictures_folder)) if not item.problem]
    names = [item.name for item in files]
    seen, drawings = (torch.stack([see(item.content) for item in files]) for see in (preprocess, EvalTransform(96)))
features = encode_images(model, seen)
drawings = drawings.permute(0, 2, 3, 1).numpy()
print(f"{len(names):,} pictures, {features.shape[1]} numbers each")

# %% [markdown]
# ## Ask with words

# %%
found = (encode_texts(model, texts, tokenizer) @ features.T).topk(min(7, len(features)))
figure, grid = plt.subplots(len(texts), 8, figsize=(10, 1.3 * len(texts)), squeeze=False, width_ratios=[1.9] + 7 * [1])
for line, text, scores, rows in zip(grid, texts, found.values.tolist(), found.indices.tolist(), strict=True):
    color = LANGUAGE_COLORS["zh" if any("\u4e00" <= letter <= "\u9fff" for letter in text) else "en"]
    line[0].text(0.95, 0.5, text, ha="right", va="center", color=color, fontsize=11, transform=line[0].transAxes)
    for axes in line:
        axes.set_axis_off()
    for axes, score, row in zip(line[1:], scores, rows, strict=True):
        axes.imshow(drawings[row])
        axes.set_title(f"{score:.2f}", fontsize=8, loc="center", pad=2)
plt.show()

# %% [markdown]
# ## Ask with a picture
#
# Its own feature is the query; the nearest one is itself and is left out.

# %%
asked = range(len(features) // 20, len(features), max(1, len(features) // 5))
found = (features[list(asked)] @ features.T).topk(min(8, len(features)))
figure, grid = plt.subplots(
    len(asked), 9, figsize=(10, 1.25 * len(asked)), squeeze=False, width_ratios=[1, 0.3] + 7 * [1]
)
for line, row, scores, rows in zip(grid, asked, found.values.tolist(), found.indices.tolist(), strict=True):
    others = [pair for pair in zip(scores, rows, strict=True) if pair[1] != row][:7]
    for axes in line:
        axes.set_axis_off()
    line[0].imshow(drawings[row])
    for axes, (score, other) in zip(line[2:], others, strict=True):
        axes.imshow(drawings[other])
        axes.set_title(f"{score:.2f}", fontsize=8, loc="center", pad=2)
grid[0, 0].set_title("query", loc="center", fontsize=9)
plt.show()

# %% [markdown]
# ## Ask with a picture and words
#
# As points can be added, so can queries: a picture, less one word, plus another. The picture is the first that the
# first text finds; the sum is scaled to length 1 again.

# %%
figure, grid = plt.subplots(
    len(mixed), 9, figsize=(10, 1.5 * len(mixed)), squeeze=False, width_ratios=[1, 1.5] + 7 * [1]
)
for line, (text, less, more) in zip(grid, mixed, strict=True):
    points = encode_texts(model, [text, less, more], tokenizer)
    start = int((features @ points[0]).argmax())
    query = torch.nn.functional.normalize(features[start] - points[1] + points[2], dim=0)
    scores = features @ query
    scores[start] = -1  # found already
    found = scores.topk(min(7, len(scores)))
    for axes in line:
        axes.set_axis_off()
    line[0].imshow(drawings[start])
    line[1].text(0.5, 0.5, f"− {less}\n+ {more}", ha="center", va="center", fontsize=10, transform=line[1].transAxes)
    for axes, score, row in zip(line[2:], found.values.tolist(), found.indices.tolist(), strict=True):
        axes.imshow(drawings[row])
        axes.set_title(f"{score:.2f}", fontsize=8, loc="center", pad=2)
plt.show()

# %% [markdown]
# ## Keep the features
#
# Encoding is the slow part. `m2-embed` writes the same kind of file for a folder of any size; names and where the
# features come from are in it.

# %%
path = run.folder / "features.safetensors"
origin = {"run": run.name, "checkpoint": checkpoint}
with open_feature_file(path, feature_dim=features.shape[1], provenance=origin, overwrite=True) as add:
    add(torch.arange(len(features)), names, features)
kept = read_features(path)
again = (encode_texts(model, texts[:1], tokenizer) @ kept.features.T).topk(1).indices.item()
print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {len(kept.names):,} pictures, from {kept.provenance}")
print(f"{texts[0]} finds {kept.names[again]} there, too")
