"""What Hugging Face transformers and sentence-transformers read, in the folder that `load` reads."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.formats import read_small_json
from m2_encoder.exports.tokenizer_json import write_tokenizer_json
from m2_encoder.files import write_json
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

REMOTE_CODE: Final = ("configuration_m2_encoder.py", "modeling_m2_encoder.py")
"""Files of code that transformers runs with `trust_remote_code=True`; they need nothing of this package."""

_MODEL: Final = "modeling_m2_encoder.M2EncoderModel"
_BICUBIC: Final = 3  # as Pillow numbers them


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
