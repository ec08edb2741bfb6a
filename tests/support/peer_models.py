"""Small random models of other libraries, as folders that these libraries save, and a few pictures and texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

TEXTS = ("a photo of a cat", "一只猫", "A Red Square and more words than the others have", "cat")
_SIGNS = "abcdefghijklmnopqrstuvwxyzA一只猫狗红."


def picture(number: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Some shapes in some colours; never two alike."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, 120))
    ImageDraw.Draw(image).ellipse((3, 3 + number % 7, 25, 20), fill=(250, number * 53 % 256, 10))
    return image


def png(number: int) -> bytes:
    """The same as a file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def save_open_clip(folder: Path, *, seed: int = 0, width: int = 16) -> Path:
    """A folder of open_clip with its own tokenizer."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": width, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1},
    }
    preprocess = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": "squash"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_tokenizer(folder: Path, *, gives_mask: bool = True, length: int = 1000) -> None:
    """One id for each sign, with a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {sign: number for number, sign in enumerate([*specials, *_SIGNS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = ["input_ids", *(["attention_mask"] if gives_mask else [])]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=names, model_max_length=length, padding_side="right",
    )  # fmt: skip
    made.save_pretrained(folder)


_TEXT: dict[str, Any] = {
    "vocab_size": 4 + len(_SIGNS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8,
}  # fmt: skip


def save_transformers(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """A folder of transformers: `clip`, `metaclip_2`, `siglip`, `siglip2` (pictures of any shape), `chinese_clip`."""
    import transformers as library

    torch.manual_seed(seed)
    if kind == "clip":
        text, vision = {**_TEXT, "max_position_embeddings": 24}, {**_VISION, "image_size": 32}
        config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        model, processor = library.CLIPModel(config), library.CLIPImageProcessor(size=32, crop_size=32)
    elif kind == "metaclip_2":
        text, vision = {**_TEXT, "max_position_embeddings": 24}, {**_VISION, "image_size": 32}
        config = library.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=12)
        model, processor = library.MetaClip2Model(config), library.CLIPImageProcessor(size=32, crop_size=32)
    elif kind == "siglip":
        text, vision = {**_TEXT, "max_position_embeddings": 64}, {**_VISION, "image_size": 32}
        config = library.SiglipConfig(text_config=text, vision_config=vision)
        model, processor = library.SiglipModel(config), library.SiglipImageProcessor(size={"height": 32, "width": 32})
    elif kind == "siglip2":
        text, vision = {**_TEXT, "max_position_embeddings": 64}, {**_VISION, "num_patches": 16}
        config = library.Siglip2Config(text_config=text, vision_config=vision)
        model = library.Siglip2Model(config)
        processor = library.Siglip2ImageProcessor(patch_size=8, max_num_patches=12)
    else:
        text, vision = {**_TEXT, "max_position_embeddings": 90}, {**_VISION, "image_size": 32}
        config = library.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        model = library.ChineseCLIPModel(config)
        processor = library.ChineseCLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # nothing is 0 or 1 by initialisation
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_tokenizer(folder, gives_mask="siglip" not in kind)
    return folder
