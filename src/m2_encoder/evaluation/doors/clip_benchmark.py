"""CLIP_benchmark's own command, for every model that `open_model` opens.

    python -m m2_encoder.evaluation.doors.clip_benchmark eval --model_type m2_encoder --model FOLDER ...

CLIP_benchmark keeps its types of models in a table, and offers no way to add one from outside: `register` adds ours,
`main` then runs its command line, with all of its own options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import FeatureModel
from m2_encoder.evaluation.models.base import EvaluatedModel, import_peer
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.types import TextTokens

MODEL_TYPE: Final = "m2_encoder"
"""For its option `--model_type`."""

_NONE: Final = "none"
"""For its option `--pretrained`: the weights are those of `--model`."""

_OUTPUT: Final = "{dataset}_{pretrained}_{model}_{language}_{task}.json"
"""What `--output` is when nobody gave it."""

_MENDED: Final = "its top-k accuracy fails with this NumPy; the same one of m2_encoder takes its place"
_EXIT_USER_ERROR: Final = 2


class DoorTokens(TextTokens):
    """Ids and mask that go to a device together, as CLIP_benchmark moves its one tensor of ids."""

    __slots__ = ()

    def to(self, device: str | torch.device) -> DoorTokens:
        """The same on a device."""
        return DoorTokens(self.ids.to(device), self.mask.to(device))


class DoorTokenizer:
    """Texts to tokens, of a model that may have no text tower: a linear probe needs none.

    Args:
        model: whose tokenizer it is.
    """

    def __init__(self, model: EvaluatedModel) -> None:
        self._model = model

    def __call__(self, texts: Sequence[str]) -> DoorTokens:
        """Ids and mask, (B, T) each.

        Raises:
            UserError: if the model has no text tower.
        """
        self._model.require_texts()
        return DoorTokens(*self._model.tokenizer(texts))


def load_for_clip_benchmark(
    model_name: str, pretrained: str = _NONE, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[FeatureModel, Any, DoorTokenizer]:
    """What CLIP_benchmark asks of a type of models: model, transform of a picture, tokenizer.

    Args:
        model_name: as `open_model` takes it: an exported folder, a run's, or a peer after its kind.
        pretrained: a checkpoint of a run's folder, or "none".
        cache_dir: not used, as nothing is downloaded.
        device: of the model.

    Raises:
        UserError: as `open_model`; for files of features, which cannot encode CLIP_benchmark's pictures.
    """
    opened = open_model(model_name, checkpoint=None if pretrained == _NONE else pretrained, device=device)
    if opened.model is None:
        raise UserError(f"{model_name}: are features, not a model; CLIP_benchmark has to encode its own pictures")
    return opened.model, opened.preprocess, DoorTokenizer(opened)


def register() -> None:
    """Adds the type to CLIP_benchmark's table; calling it again changes nothing.

    Raises:
        UserError: without the package.
    """
    table = _import("clip_benchmark.models")
    table.TYPE2FUNC[MODEL_TYPE] = load_for_clip_benchmark
    if MODEL_TYPE not in table.MODEL_TYPES:  # its command line holds this very list
        table.MODEL_TYPES.append(MODEL_TYPE)


def mend_accuracy() -> bool:
    """Put a top-k accuracy that works in the place of CLIP_benchmark's, where that does not; whether it was so.

    Version 1.6.2 makes a float of an array of one number, which NumPy refuses since 2.4.

    Raises:
        UserError: without the package.
    """
    module = _import("clip_benchmark.metrics.zeroshot_classification")
    try:
        module.accuracy(torch.eye(2), torch.arange(2), topk=(1,))
    except TypeError:
        module.accuracy = _accuracy
        return True
    return False


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Shares of rows with their target among the k largest; (n, C) and (n,)."""
    right = output.topk(max(topk), dim=1).indices == target[:, None]
    return [float(right[:, :k].any(dim=1).double().mean()) for k in topk]


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Those of its command `eval`, with `--pretrained none` for our type where nobody gave one.

    Otherwise its default, weights of LAION, would stand in the result. A result that is called after a path could not
    be written once everything is measured, and is refused here.

    Raises:
        UserError: if a model is a path and stands in the name of the output.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", default=[])
    parser.add_argument("--model_type")
    parser.add_argument("--pretrained", nargs="+")
    parser.add_argument("--output", default=_OUTPUT)
    given = parser.parse_known_args(list(arguments))[0]
    paths = [name for name in given.model if "/" in name]
    if paths and "{model}" in given.output:
        fix = "name a file, such as --output '{dataset}_{language}_{task}.json'"
        raise UserError(f"--output {given.output} puts the model {paths[0]} into the name of a file; {fix}")
    added = ["--pretrained", _NONE] if given.model_type == MODEL_TYPE and given.pretrained is None else []
    return [*arguments, *added]


def _import(module: str) -> Any:
    return import_peer(module, "evaluations by CLIP_benchmark", extra="doors")


def main() -> int:
    """CLIP_benchmark's command line with our type of models; its exit code, or 2 for what a user can mend."""
    try:
        register()
        if sys.argv[1:2] == ["eval"]:
            sys.argv[2:] = prepare_arguments(sys.argv[2:])
            if mend_accuracy():
                print(f"clip_benchmark: {_MENDED}", file=sys.stderr)
        _import("clip_benchmark.cli").main()
    except UserError as error:
        print(f"clip_benchmark: {error}", file=sys.stderr)
        return _EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
