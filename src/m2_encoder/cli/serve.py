"""`m2-serve`: a search page, and the interfaces by which immich, MT-Photos and other programs ask for features."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import socket
import sys
import webbrowser
from collections.abc import Mapping
from typing import Annotated, Any, Final

from annotated_types import Ge, Le
from rich.console import Console
from rich.progress import Progress

from m2_encoder.bounds import Text
from m2_encoder.checkpoints.download import is_url
from m2_encoder.config.check import check_settings
from m2_encoder.config.model_choice import device_of, is_model_name, model_problems, needs_tokenizer, runtime_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, find_path
from m2_encoder.config.problems import UNSET, find_problems
from m2_encoder.data.emoji.drawings import write_drawings
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.index import PictureIndex, open_index
from m2_encoder.picture_search.model import Runtime, SearchModel, open_index_model, open_search_model
from m2_encoder.picture_search.update import update_index

DRAWINGS: Final = "drawings"
"""In place of an index: the built-in drawings."""

_FOLDER: Final = "outputs/drawings"
_CALLED: Final[Mapping[Runtime, str]] = {"torch": "torch", "onnx": "ONNX Runtime"}
_PACKAGES: Final = ("starlette", "uvicorn", "python_multipart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The keys of m2-serve; `conf/commands/serve.yaml` says what they mean."""

    index: Text | None
    model: Any
    weights: Any
    tokenizer: Any
    device: Any
    runtime: Runtime
    host: Text
    port: Annotated[int, Ge(0), Le(65535)]
    api_key: Text | None
    batch_size: Annotated[int, Ge(1), Le(1024)]
    max_body_mb: Annotated[int, Ge(1), Le(1024)]
    max_waiting: Annotated[int, Ge(1), Le(10_000)]
    open: bool


def check_serve(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-serve, before the model is loaded."""
    problems = check_settings(ServeSettings, cfg)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        fix = "install it with pip install 'm2-encoder[serve]'"
        problems.append(Problem("m2-serve", NOTHING, f"needs an extra ({', '.join(missing)})", fix))
    key = cfg["api_key"]
    if isinstance(key, str) and not (key.isascii() and key.isprintable()):
        problems.append(Problem("api_key", NOTHING, "must be of ASCII letters, digits and signs, as headers are"))
    problems += _model_problems(cfg)
    if problems:
        return problems
    has_index = cfg["index"] not in (None, DRAWINGS)
    of_index = open_index(find_path(cfg["index"])).made_by.model if has_index else None
    return runtime_problems(cfg, of_index=of_index)


def _model_problems(cfg: dict[str, Any]) -> list[Problem]:
    index, model = cfg["index"], cfg["model"]
    if isinstance(index, str) and index != DRAWINGS:
        try:
            root = open_index(find_path(index)).root
        except UserError as error:
            return find_problems(error.under("index"))
        if not root.is_dir():
            fix = f"if they were moved, run m2-search index PHOTOS output={index}; nothing is encoded again"
            return [Problem("index", index, f"its pictures were in {root}, which is not there", fix)]
    if model is None and (index is None or index == DRAWINGS):
        return [Problem("model", NOTHING, "must be given", "add model=FOLDER, one that m2-export wrote")]
    if model is None:
        problems = [each for each in model_problems({**cfg, "model": UNSET}) if each.key == "device"]
        given = [key for key in ("weights", "tokenizer") if cfg[key] is not None]
        return [*problems, *(Problem(key, cfg[key], "belongs to a model; add model=") for key in given)]
    problems = model_problems(cfg)
    if index == DRAWINGS and isinstance(model, str) and not is_model_name(model) and not find_path(model).is_dir():
        fix = "`make train` trains one there in minutes; or give the folder of another, one that m2-export wrote"
        return [Problem("model", model, "there is no trained model yet", fix)]
    if needs_tokenizer(cfg):
        problems.append(Problem("tokenizer", None, "words need the SentencePiece file of a named model"))
    return problems


def run_serve(cfg: dict[str, Any]) -> int:
    """Serves until it is ended by a signal.

    Raises:
        UserError: if the model is not that of the index, or the host or port cannot be had.
    """
    from m2_encoder.serving.app import ServerLimits, build_app
    from m2_encoder.serving.guard import is_loopback
    from m2_encoder.serving.server import listen, serve, url_of

    opened = listen(cfg["host"], cfg["port"])  # before the model is loaded: a taken port is known at once
    with opened:
        index, model = _open(cfg)
        only_loopback = is_loopback(cfg["host"])
        app = build_app(
            model,
            index=index,
            api_key=cfg["api_key"],
            only_loopback=only_loopback,
            limits=ServerLimits(
                batch_size=cfg["batch_size"],
                max_body_bytes=cfg["max_body_mb"] * 2**20,
                max_waiting=cfg["max_waiting"],
            ),
        )
        url = url_of(opened, cfg["host"] if cfg["host"] not in ("0.0.0.0", "::") else socket.gethostname())

        def tell() -> None:
            pictures = "no index: immich and MT-Photos alone" if index is None else f"{len(index):,} pictures"
            say(f"{pictures}, {model.name} on {_CALLED[cfg['runtime']]}: {url}  (Ctrl-C ends it)")
            if not only_loopback:
                can = "use the model" if index is None else "see the pictures"
                say(f"m2-serve: whoever reaches port {cfg['port']} of this machine can {can}", error=True)
            if cfg["open"]:
                _open_browser(url)

        with contextlib.suppress(KeyboardInterrupt):
            serve(app, opened, on_start=tell)
        say("m2-serve: ended", error=True)
    return 0


def _open(cfg: dict[str, Any]) -> tuple[PictureIndex | None, EvaluatedModel]:
    """The index, if one is asked for, and the model."""
    device = device_of(cfg["device"])
    given: dict[str, Any] = {key: _place(cfg[key]) for key in ("model", "weights", "tokenizer")}
    how: dict[str, Any] = {"device": device, "runtime": cfg["runtime"]}
    if cfg["index"] not in (None, DRAWINGS):
        index = open_index(find_path(cfg["index"]))
        return index, open_index_model(index, **given, **how)
    opened = open_search_model(**given, **how)
    return None if cfg["index"] is None else _index_drawings(opened), opened.encoder


def _index_drawings(model: SearchModel) -> PictureIndex:
    """The index of the built-in drawings by a model, made unless it is there."""
    drawings = write_drawings(anchor(_FOLDER) / "pictures")
    place = anchor(_FOLDER) / f"{model.made_by.fingerprint[:8]}.index"
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("index drawings", total=None)
        update_index(
            place,
            drawings,
            model,
            report=lambda done, total, _: progress.update(task, completed=done, total=total),
        )
    return open_index(place)


def _place(value: str | None) -> str | None:
    """A name or a URL as it is; a path as `find_path` finds it."""
    return value if value is None or is_model_name(value) or is_url(value) else str(find_path(value))


def _open_browser(url: str) -> None:
    """Opens a page in a browser with windows; a browser in the terminal would take it over."""
    has_windows = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if not has_windows or not webbrowser.open(url):
        say(f"m2-serve: no browser could be opened here; open {url} yourself", error=True)
