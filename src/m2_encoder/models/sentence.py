"""Somebody's sentence encoder on disk, a folder of sentence-transformers, as text tower with a tokenizer of its own.

Both are parts of `models.composed.ComposedTowers`: LLM2CLIP (arXiv:2411.04997), ProCLIP (arXiv:2510.18795). Nothing is
fetched, and no code of the folder is run.

Letters: B batch · T tokens · D width of the encoder's embeddings.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from m2_encoder.bounds import Text, Tokens, check_bounds
from m2_encoder.errors import UserError, in_one_line
from m2_encoder.types import TextTokens

_MODULES_FILE: Final = "modules.json"
_CONFIG_FILE: Final = "config.json"
_LENGTH_FILE: Final = "sentence_bert_config.json"  # of older folders; others leave it to the tokenizer
_NO_LENGTH: Final = 10**6  # tokenizers without a length of their own say something above


class SentenceEncoder(nn.Module):
    """The encoder of such a folder, with its pooling and what else its `modules.json` names, in fp32.

    Args:
        folder: as sentence-transformers saves it.

    Raises:
        UserError: if it is none, or cannot be loaded.
    """

    @check_bounds
    def __init__(self, folder: Text) -> None:
        super().__init__()
        path, _ = _find_first(folder)
        library = _import("sentence_transformers")
        try:
            self.encoder = library.SentenceTransformer(str(path), device="cpu", local_files_only=True).float()
        except Exception as error:  # the library raises a dozen unrelated types
            raise UserError(f"cannot be loaded: {in_one_line(error)}", key="folder", value=folder) from error

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, (B, D), of ids, (B, T), with True on tokens in the mask, (B, T)."""
        made = self.encoder({"input_ids": ids, "attention_mask": mask.long()})
        found: Tensor = made["sentence_embedding"]
        return found


class SentenceTokenizer:
    """The tokenizer of such a folder.

    Args:
        folder: as sentence-transformers saves it.
        context_length: longer texts are cut; None for what the folder says.
        prompt: put before every text, such as "query: " for E5.

    Raises:
        UserError: if the folder is none, has no tokenizer, or one that cannot pad; if it does not say a length and none
            is given; or if a length leaves no place for a text, or exceeds the positions of the encoder.
    """

    @check_bounds
    def __init__(self, folder: Text, context_length: Tokens | None = None, prompt: str = "") -> None:
        _, first = _find_first(folder)
        library = _import("transformers")
        try:
            self._tokenizer: Any = library.AutoTokenizer.from_pretrained(str(first), local_files_only=True)
        except Exception as error:  # as above
            raise UserError(f"has no tokenizer: {in_one_line(error)}", key="folder", value=folder) from error
        said = _read_number(first / _LENGTH_FILE, "max_seq_length")
        length = context_length or said or self._tokenizer.model_max_length
        if length >= _NO_LENGTH:
            raise UserError("must be a number: the folder does not say it", key="context_length")
        self._context_length, self._prompt = length, prompt
        if (most := _read_number(first / _CONFIG_FILE, "max_position_embeddings")) and length > most:
            rule = f"must be at most {most}, the positions of the encoder"
            raise UserError(rule, key="context_length", value=length)
        if self._tokenizer.pad_token is None:
            raise UserError("has a tokenizer without a token for padding", key="folder", value=folder)
        if (taken := len(self._tokenizer(prompt)["input_ids"])) >= length:
            rule = f"must be above {taken}, the tokens of every text and of the prompt"
            raise UserError(rule, key="context_length", value=length)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> TextTokens:
        """Ids and mask, (B, T) each, padded to the longest text."""
        made = self._tokenizer(
            [self._prompt + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._context_length,
            return_tensors="pt",
        )
        return TextTokens(made["input_ids"], made["attention_mask"].bool())


def _find_first(folder: str) -> tuple[Path, Path]:
    """The folder, and that of its first module, which has the tokenizer."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError("no such folder", key="folder", value=folder)
    try:
        modules = json.loads((path / _MODULES_FILE).read_bytes())
        return path, path / modules[0]["path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        rule = f"is no folder of sentence-transformers ({_MODULES_FILE}: {in_one_line(error)})"
        raise UserError(f"{rule}; give one that its save_pretrained wrote", key="folder", value=folder) from error


def _read_number(path: Path, key: str) -> int | None:
    """A whole number in a JSON file; None where there is none."""
    try:
        found = json.loads(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"a sentence encoder needs {name}; install it with pip install 'm2-encoder[peers]'") from error
