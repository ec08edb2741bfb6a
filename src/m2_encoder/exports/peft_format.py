"""A low-rank adapter apart from its base, in the files of Hugging Face peft."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

from m2_encoder.checkpoints.card_words import Words
from m2_encoder.checkpoints.peft_files import read_adapter, write_adapter
from m2_encoder.errors import CheckpointError
from m2_encoder.exports.base import ExportFormat, ExportSource, Measured

FOLDER: Final = "adapter"
"""Not beside `config.json`: transformers would put an adapter there on top of the merged weights."""


class Peft(ExportFormat):
    """`adapter/`, of a run with `adaptation=lora`. Its numbers are read back and compared."""

    needs_adapter: ClassVar[bool] = True

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        assert source.adapter is not None, "the command asks for it"
        (folder / FOLDER).mkdir(parents=True)
        write_adapter(folder / FOLDER, source.adapter)

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says."""
        stored, own = read_adapter(folder / FOLDER), source.adapter
        assert own is not None, "as in write"
        if stored.pairs.keys() != own.pairs.keys() or stored.whole.keys() != own.whole.keys():
            raise CheckpointError(f"{folder}: the adapter was not written as it is")
        both = [
            (one, other) for name in own.pairs for one, other in zip(own.pairs[name], stored.pairs[name], strict=True)
        ]
        both += [(own.whole[name], stored.whole[name]) for name in own.whole]
        worst = max(float((one.float() - other).abs().max()) for one, other in both)
        equal = (Words("numbers equal to the bit", "数值逐位相等"),)
        return Measured(worst, 1.0 if worst == 0 else -1.0, notes=equal if worst == 0 else ())

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        return _USAGE


_USAGE: Final = """`adapter/` 只含训练出的低秩更新，须配训练起点的权重；推理时可合并。

```python
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained("path/to/the/base", trust_remote_code=True)  # m2-export model=BASE to=[transformers]
model = PeftModel.from_pretrained(base, "path/to/this/folder/adapter").eval()
```

`adapter/` holds the low-rank updates alone; they belong to the weights that training began with. Without peft:
`m2_encoder.load("path/to/the/base", adapter="path/to/this/folder/adapter")`, which refuses another base."""
