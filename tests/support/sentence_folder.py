"""A small sentence encoder on disk, as sentence-transformers saves it, with random weights."""

from __future__ import annotations

from pathlib import Path

import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = (
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "a",
    "cat",
    "dog",
    "number",
    "in",
    "猫",
    "狗",
    "数",
    "字",
    "的",
    *"0123456789",
)


def write_sentence_encoder(folder: Path, *, width: int = 16, length: int = 12) -> Path:
    """The folder, of a BERT of one layer with mean pooling."""
    torch.manual_seed(11)
    rules = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    rules.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=length, **names)
    shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    inside = folder.parent / f"{folder.name}-bert"
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)).save_pretrained(inside)
    tokenizer.save_pretrained(inside)
    first = modules.Transformer(str(inside), max_seq_length=length)
    sentence_transformers.SentenceTransformer(
        modules=[first, modules.Pooling(width, pooling_mode="mean")], device="cpu"
    ).save(str(folder))
    return folder
