"""The folder that `m2_encoder.load` reads: configuration, weights, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path

from m2_encoder.checkpoints.card_words import Words
from m2_encoder.checkpoints.exported import read_exported
from m2_encoder.checkpoints.io import read_state
from m2_encoder.errors import CheckpointError
from m2_encoder.exports.base import ExportFormat, ExportSource, Measured


class Native(ExportFormat):
    """What `load` reads. All weights are read back and compared: its features are then ours, to the bit."""

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        source.write_native(folder)

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says."""
        exported, own = read_exported(folder), source.tokenizer
        stored, kept = read_state(exported.weights), source.model.state_dict()
        if exported.config != source.model.config or exported.tokenizer.read_bytes() != own.model_bytes:
            raise CheckpointError(f"{folder}: the architecture or the tokenizer was not written as it is")
        if stored.keys() != kept.keys():
            raise CheckpointError(f"{folder}: other weights were written than the model has")
        worst = max(float((kept[name].float() - value.float()).abs().max()) for name, value in stored.items())
        equal = (Words("weights equal to the bit", "权重逐位相等"),)
        return Measured(worst, 1.0 if worst == 0 else -1.0, notes=equal if worst == 0 else ())

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        return '`m2_encoder.load("path/to/this/folder")`，见上文 / see above.'
