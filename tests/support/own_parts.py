"""A user's folder with parts of every kind, and the YAML files that choose them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODULE: Final = '''
from __future__ import annotations

import json
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from m2_encoder.data.samples.sample import Column
from m2_encoder.evaluation.tasks.base import EvaluationTask, TaskResult
from m2_encoder.objectives.base import Objective, ObjectiveOutput
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.types import ImageTextBatch, TextTokens

USED = []  # the names of parts that have done something


class Tokenizer:
    vocab_size = 300

    def __call__(self, texts):
        rows = [[1 + byte for byte in text.encode()[:12]] for text in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


class Towers(nn.Module):
    def __init__(self, vocab_size, image_size, width=16):
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, width))
        self.words = nn.Embedding(vocab_size, width)
        self.classifier = nn.Linear(width, 1000)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, images):
        assert images.is_floating_point() and images.shape[1:] == (3, 16, 16)
        return self.image(images)

    def encode_text(self, ids):
        return self.words(ids).mean(dim=1)


class Pull(Objective):
    def forward(self, inputs):
        USED.append("objective")
        loss = 1 - (inputs.image_features * inputs.text_features[: len(inputs.image_features)]).sum(dim=1)
        assert inputs.batch is None or "length" not in inputs.batch.extra or inputs.batch.extra["length"].min() > 0
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach())


class FreezeWords(Adaptation):
    def apply(self, model):
        model.towers.words.requires_grad_(False)

    def merge(self, model):
        USED.append("adaptation")
        return model


class CountBatches(lightning.Callback):
    def on_train_batch_end(self, *_):
        USED.append("callback")


class Spread(EvaluationTask):
    def measure(self, context):
        USED.append("evaluation")
        split, features = next(iter(context.features.items()))
        return TaskResult({f"val/{split}/spread": float(features.image_features.std())})


class Lines(Logger):
    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    name, version = "lines", ""

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        USED.append("logger")
        self.path.write_text(json.dumps(sorted(metrics)))


class Length(Column):
    per_caption = True

    def read(self, sample):
        USED.append("column")
        return [len(caption.text) for caption in sample.captions]


class Plain:
    """A transform: augments nothing."""

    def __init__(self, image_size):
        self.side = image_size

    def __call__(self, source, *, rng):
        USED.append("transform")
        pixels = torch.as_tensor(source)
        assert pixels.shape[0] == 3
        return nn.functional.interpolate(pixels[None].float(), self.side)[0].to(torch.uint8)


class Pairs(Dataset):
    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        USED.append("dataset")
        generator = torch.Generator().manual_seed(index)
        return torch.rand((3, 16, 16), generator=generator), [f"number {index}", f"数字 {index}"]


class Batches(lightning.LightningDataModule):
    """Gives batches of ours, from a DataLoader of its own."""

    def __init__(self, tokenizer, rows=8):
        super().__init__()
        self.tokenizer, self.rows = tokenizer, rows

    def train_dataloader(self):
        return DataLoader(Pairs(), batch_size=self.rows, collate_fn=self.collate)

    def collate(self, items):
        USED.append("datamodule")
        numbers = torch.arange(len(items))
        return ImageTextBatch(
            images=torch.stack([image for image, _ in items]),
            text=self.tokenizer([captions[0] for _, captions in items]),
            language=torch.zeros_like(numbers),
            identity=numbers,
            keys=tuple(map(str, numbers.tolist())),
            sources=("own",) * len(items),
        )


class Task(lightning.LightningModule):
    """Learns to tell the mean of a picture; with settings of its own, which hold more than plain values."""

    def __init__(self, width=4, activation=nn.ReLU):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, width), activation(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        USED.append("task")
        images = batch.images.float()
        loss = (self.net(images) - images.mean(dim=(1, 2, 3))[:, None]).square().mean()
        self.log("train/mse", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Vectors(lightning.LightningDataModule):
    def __init__(self, size=64, shift=0):
        super().__init__()
        self.size = size
        if shift:
            self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(self.size, 5), torch.randn(self.size, 1)), batch_size=8)


class Regression(lightning.LightningModule):
    """Optimizes by hand, and takes batches of plain tensors."""

    def __init__(self, optimizer=None, size=5):
        super().__init__()
        self.save_hyperparameters("size")
        self.automatic_optimization = False
        self.make, self.net = optimizer, nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = (self.net(inputs) - targets).square().mean()
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()

    def configure_optimizers(self):
        return self.make(self)
'''

FILES: Final = {
    "experiment/two_steps.yaml": """
# @package _global_
defaults:
  - override /logger: csv
  - override /scheduler: constant
  - override /evaluation: []
run: { checkpoint_every: 1 }
trainer: { accelerator: cpu, max_steps: 2, log_every_n_steps: 1 }
""",
    "model/small.yaml": """
defaults: [tiny, _self_]
image_size: 16
patch_size: 8
num_layers: 1
embed_dim: 32
feature_dim: 16
num_heads: 2
""",
    "model/towers.yaml": """
_target_: my_parts_of_mine.Towers
tokenizer: { _target_: my_parts_of_mine.Tokenizer }
image_size: 16
width: 12
pixel_mean: [0.5, 0.5, 0.5]
""",
    "objective/pull.yaml": "pull: { _target_: my_parts_of_mine.Pull, weight: 0.5, schedule: null }\n",
    "adaptation/freeze_words.yaml": "_target_: my_parts_of_mine.FreezeWords\n",
    "evaluation/spread.yaml": "spread: { _target_: my_parts_of_mine.Spread }\n",
    "logger/lines.yaml": "lines: { _target_: my_parts_of_mine.Lines, path: '${run.folder}/lines.json' }\n",
    "optimizer/sgd.yaml": "_target_: torch.optim.SGD\nlr: 0.05\nmomentum: 0.9\n",
    "scheduler/steps.yaml": "_target_: torch.optim.lr_scheduler.StepLR\nstep_size: 1\ngamma: 0.5\n",
    "data/own.yaml": "_target_: my_parts_of_mine.Batches\nrows: 8\n",
    "data/vectors.yaml": "_target_: my_parts_of_mine.Vectors\n",
    "task/mean.yaml": "_target_: my_parts_of_mine.Task\nwidth: 6\n",
    "task/regression.yaml": "_target_: my_parts_of_mine.Regression\n",
}


def write_own_parts(folder: Path) -> Path:
    """The folder, with `my_parts_of_mine.py` and a YAML file for each part."""
    for name, text in {"my_parts_of_mine.py": MODULE, **FILES}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
