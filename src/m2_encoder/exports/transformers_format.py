"""What Hugging Face transformers and sentence-transformers read, in the folder that `load` reads."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from m2_encoder.checkpoints.card_words import Words
from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.formats import read_small_json
from m2_encoder.data.images.transforms import open_image
from m2_encoder.errors import NOTHING, Problem, UserError, abridge
from m2_encoder.exports.base import ExportFormat, ExportSource, Features, Measured, compare
from m2_encoder.exports.onnx_format import missing_extra
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.exports.tokenizer_json import write_tokenizer_json
from m2_encoder.files import write_json
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

REMOTE_CODE: Final = ("configuration_m2_encoder.py", "modeling_m2_encoder.py")
"""Files of code that transformers runs with `trust_remote_code=True`; they need nothing of this package."""

_RUNNER: Final = Path(__file__).with_name("run_transformers.py")
_MODEL: Final = "modeling_m2_encoder.M2EncoderModel"
_MAX_GAP: Final = 1e-3  # between a text alone and in a batch
_BICUBIC: Final = 3  # as Pillow numbers them


class Transformers(ExportFormat):
    """The folder that `load` reads, which transformers and sentence-transformers open, too."""

    def problems(self, config: M2EncoderConfig) -> Iterator[Problem]:
        """As the base class says."""
        if missing := list(missing_extra(("transformers", "torchvision"))):
            yield from missing
        elif int((version := importlib.metadata.version("transformers")).split(".", 1)[0]) < 5:
            rule = f"transformers {version} is installed, whose older processors crop pictures"
            yield Problem("", NOTHING, rule, "pip install -U 'transformers>=5'")

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        source.write_native(folder)
        write_transformers(folder, config=source.model.config, tokenizer=source.tokenizer)

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says; pictures are opened by us, and as files by transformers for the note."""
        with tempfile.TemporaryDirectory() as scratch:
            found = _run(folder, Path(scratch), source)
        if found["loads_differ"]:
            raise UserError("transformers changes weights as it loads them: two models of one folder differ")
        if not found["batch_difference"] < _MAX_GAP:
            raise UserError("features of texts by transformers depend on the batch")
        images, files, texts = (torch.from_numpy(found[name]) for name in ("images", "files", "texts"))
        compared = compare(Features(source.image_features, source.text_features()), Features(images, texts))
        cosines = torch.nn.functional.cosine_similarity(files, source.image_features)
        other, least = int((cosines < self.bound).sum()), float(cosines.min())
        note = Words(
            f"files that transformers opens by itself: {other} of {len(cosines)} sample pictures have other features, "
            f"the smallest cosine is {least:.2f}; it drops alpha, obeys the orientation and clips levels of 16 bits",
            f"由 transformers 自己打开的文件：{len(cosines)} 张样本图片中 {other} 张特征不同，最小余弦 {least:.2f}；"
            "它丢弃透明度，遵循方向信息，截断 16 位灰度",
        )
        return Measured(*compared, float(found["image_ms"]), float(found["text_ms"]), int(found["peak_bytes"]), (note,))

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        return _USAGE


def write_transformers(folder: Path, *, config: M2EncoderConfig, tokenizer: SentencePieceTokenizer) -> None:
    """Add to the folder of an export what transformers and sentence-transformers read; `load` goes on reading it.

    Args:
        folder: that `export_model` wrote; weights and what the tokenizer is made of stay as they are.
        config: architecture of the exported model.
        tokenizer: the exported one.

    Raises:
        UserError: if the tokenizer has no equal there (`write_tokenizer_json`), or the disk refuses.
    """
    write_tokenizer_json(tokenizer, folder)
    write_json(folder / CONFIG_FILE, {**read_small_json(folder / CONFIG_FILE), **_config(config, tokenizer)})
    for name, content in _side_files(config).items():
        write_json(folder / name, content)
    for name in REMOTE_CODE:
        with resources.as_file(resources.files("m2_encoder.exports.remote_code") / name) as path:
            shutil.copyfile(path, folder / name)


def _config(config: M2EncoderConfig, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """What goes into `config.json`, beside what `load` reads."""
    return {
        "model_type": "m2_encoder",
        "architectures": ["M2EncoderModel"],
        "auto_map": {
            "AutoConfig": "configuration_m2_encoder.M2EncoderConfig",
            "AutoModel": _MODEL,
            "AutoModelForZeroShotImageClassification": _MODEL,
        },
        "dtype": "float32",
        "projection_dim": config.feature_dim,
        "hidden_size": config.embed_dim,
        "pad_token_id": tokenizer.end_id,
        "eos_token_id": tokenizer.end_id,
    }


def _side_files(config: M2EncoderConfig) -> dict[str, Any]:
    """Other files by name."""
    levels = [0.5, 0.5, 0.5]
    side = config.image_size
    modality = {kind: {"method": f"get_{kind}_features", "method_output_name": None} for kind in ("text", "image")}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": _BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": levels,
            "image_std": levels,
        },
        "processor_config.json": {"processor_class": "CLIPProcessor"},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        ],
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "prompts": {"query": "", "document": ""},
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": modality,
            "module_output_name": "sentence_embedding",
        },
    }


def _run(folder: Path, scratch: Path, source: ExportSource) -> dict[str, Any]:
    """What `run_transformers.py` finds in another process, offline; copies of code that it makes stay in `scratch`."""
    pictures, files = [], []
    for number, (name, content) in enumerate(make_pictures()):
        files.append(scratch / f"{number}-{name}")
        files[-1].write_bytes(content)
        pictures.append(scratch / f"{number}.png")
        open_image(content, pictures=source.loaded.preprocess.pictures).save(pictures[-1])
    inputs, outputs = scratch / "inputs.json", scratch / "outputs.npz"
    write_json(inputs, {"pictures": [*map(str, pictures)], "files": [*map(str, files)], "texts": TEXTS})
    apart = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    arguments = [str(path) for path in (_RUNNER, folder, inputs, outputs)]
    done = subprocess.run(
        [sys.executable, *arguments, str(torch.get_num_threads())],
        capture_output=True, text=True, check=False, env={**os.environ, **apart},
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"transformers cannot open the folder: {abridge(said[-1], 300)}")
    with np.load(outputs) as found:
        return dict(found)


_USAGE: Final = """用 transformers（>= 5）和 sentence-transformers（>= 5.4）打开同一个文件夹；图片压成正方形，不裁剪：

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

folder = "path/to/this/folder"
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(
    text=["一只猫", "a dog"], images=Image.open("cat.jpg").convert("RGB"), padding=True, truncation=True,
    return_tensors="pt",
)
print(model(**inputs).logits_per_image.softmax(dim=-1))

classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
print(classify("cat.jpg", candidate_labels=["猫", "狗"], hypothesis_template="一张{}的照片"))

from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(folder, trust_remote_code=True)
print(encoder.similarity(encoder.encode(["一只猫", "a dog"]), encoder.encode([Image.open("cat.jpg").convert("RGB")])))
```

transformers (>= 5) and sentence-transformers (>= 5.4) open the same folder. `trust_remote_code=True` runs
`configuration_m2_encoder.py` and `modeling_m2_encoder.py`, which import torch and transformers alone. Pictures are
squashed to a square, not cropped; the processor normalises them, the model does not."""
