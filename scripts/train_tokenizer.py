"""Trains the built-in set's bilingual tokenizer: `src/m2_encoder/assets/emoji/tokenizer.model`.

    python scripts/train_tokenizer.py

A SentencePiece unigram model on the captions of the training concepts alone, so that held-out words meet it
as unseen as a user's do. The same captions and version (sentencepiece 0.2.3) give the same bytes, in seconds.

The choices, which differ from the official model for the sake of a small one:

- Case is folded (`nmt_nfkc_cf`; the official model keeps it): 5,000 English captions cannot teach that "Dog"
  is "dog".
- Chinese is cut into characters. A word piece such as 海豚 would hide what an unseen 海龟 shares with it, and
  SentencePiece would otherwise also learn a second piece "▁海" for every frequent first character.
- Coverage is below 1: characters seen once become their UTF-8 bytes. They teach one concept little, and the
  byte pieces, on which every unseen character falls back, are trained instead of random.
- 3,500 pieces leave about 1,400 for English: common words whole, rarer ones in parts that other words share.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import sentencepiece

from m2_encoder.data.emoji.dataset import load_emoji_concepts
from m2_encoder.tokenizers.training import train_tokenizer
from m2_encoder.types import LANGUAGES

VOCAB_SIZE = 3500
CHARACTER_COVERAGE = 0.998


def load_captions(split: str) -> dict[str, list[str]]:
    """Captions by language, once per concept that has them."""
    concepts = [concept for concept in load_emoji_concepts() if concept.split == split]
    return {
        language: [text for concept in concepts for text in concept.captions[language].texts()]
        for language in LANGUAGES
    }


def report(model: bytes) -> None:
    """Prints how the captions of the training and validation concepts split."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    training = load_captions("train")
    seen = Counter(piece for texts in training.values() for text in texts for piece in processor.encode(text))
    print(f"{len(processor)} pieces, {len(model) / 1000:.0f} kB")
    for split, captions in (("train", training), ("val", load_captions("val"))):
        for language, texts in captions.items():
            pieces = [piece for text in texts for piece in processor.encode(text)]
            share_bytes = sum(processor.is_byte(piece) for piece in pieces) / len(pieces)
            share_unseen = sum(seen[piece] == 0 for piece in pieces) / len(pieces)
            print(
                f"{split} {language}: {len(texts)} captions, {len(pieces) / len(texts):.2f} pieces each, "
                f"{share_bytes:.1%} bytes, {share_unseen:.1%} pieces that training never shows"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "src/m2_encoder/assets/emoji/tokenizer.model"
    parser.add_argument("--output", type=Path, default=default, help="default: %(default)s")
    arguments = parser.parse_args()
    captions = load_captions("train")
    texts = (text for language in LANGUAGES for text in captions[language])
    model = train_tokenizer(texts, vocab_size=VOCAB_SIZE, coverage=CHARACTER_COVERAGE)
    arguments.output.write_bytes(model)
    report(model)


if __name__ == "__main__":
    main()
