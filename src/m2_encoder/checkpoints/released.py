"""The released weights of M2-Encoder by name: in folders of this machine first, then from hubs.

Nothing here was tried against the hubs themselves; which repositories hold them is what the official code says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from m2_encoder.checkpoints.download import cache_folder, download, has_part
from m2_encoder.checkpoints.weight_files import check_download
from m2_encoder.errors import CheckpointError, UserError

FOLDER_VARIABLE: Final = "M2_ENCODER_WEIGHTS"
"""Environment variable that names a folder of released files."""

TOKENIZER_FILE: Final = "sp.model"
"""The official tokenizer, looked for beside the weights."""

_OFFLINE: Final = ("1", "on", "yes", "true")


class Release(NamedTuple):
    """Where a model was released."""

    repository: str  # at ModelScope, and at hubs that HF_ENDPOINT names
    file: str


RELEASES: Final[Mapping[str, Release]] = {
    "m2-encoder-0.4b": Release("M2Cognition/M2-Encoder", "m2_encoder_0.4B.ckpt"),
    "m2-encoder-1b": Release("M2Cognition/M2_Encoder_Large", "m2_encoder_1B.ckpt"),
    "m2-encoder-10b": Release("M2Cognition/M2_Encoder_Huge", "m2_encoder_10B.ckpt"),
}
"""By the names of `load`."""


def find_release(name: str) -> Path:
    """The file of released weights: one on this machine, or a download into the cache of `checkpoints.download`.

    Looked for in `M2_ENCODER_WEIGHTS` (with or without folders of the repository's name), then in the caches of
    ModelScope and of Hugging Face's hub; then fetched from `HF_ENDPOINT` if that is set, from ModelScope, and from
    Hugging Face. `HF_HUB_OFFLINE=1` fetches nothing. Proxies are those of the environment.

    Raises:
        CheckpointError: if no place has it, naming each and what it said. A download that broke off is not begun anew
            at another place: the same call continues it.
        UserError: if `M2_ENCODER_WEIGHTS` is no folder.
    """
    release = RELEASES[name]
    if (found := next(_local_files(release), None)) is not None:
        return found
    failed = []
    for url in _addresses(release):
        try:
            return download(url, check=check_download)
        except CheckpointError as error:  # noqa: PERF203 - once per hub
            if has_part(url):
                raise
            failed.append(f"{url}: {str(error).removeprefix(f'cannot download {url}: ')}")
    tried = "; ".join(failed) if failed else "no hub is asked, as HF_HUB_OFFLINE is set"
    fix = f"set {FOLDER_VARIABLE} to its folder, HF_ENDPOINT to a mirror, or pass weights={release.file!r}"
    raise CheckpointError(
        f"{name}: {release.file} is not on this machine, and could not be fetched ({tried}); {fix}. "
        "A model with random weights is M2Encoder(config)"
    )


def find_tokenizer_beside(weights: Path) -> Path | None:
    """The official tokenizer in the folder of released weights, as in the official code's `vlmo/tokenizer`, too."""
    places = (weights.parent / TOKENIZER_FILE, weights.parent / "vlmo" / "tokenizer" / TOKENIZER_FILE)
    return next((place for place in places if place.is_file()), None)


def _local_files(release: Release) -> Iterator[Path]:
    named = os.environ.get(FOLDER_VARIABLE)
    if named and not Path(named).expanduser().is_dir():
        raise UserError("no such folder; give the one that holds the released files", key=FOLDER_VARIABLE, value=named)
    roots = [Path(named).expanduser()] if named else []
    owner, own = release.repository.split("/")
    folders = [folder for root in roots for folder in (root, root / own, root / owner / own)]
    folders += _modelscope_folders(owner, own)
    folders += _hugging_face_folders(owner, own)
    folders.append(cache_folder())
    for folder in folders:
        if (file := folder / release.file).is_file():
            yield file


def _modelscope_folders(owner: str, own: str) -> Iterator[Path]:
    configured = os.environ.get("MODELSCOPE_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "modelscope"
    for place in (root, root / "models", root / "hub", root / "hub" / "models"):
        yield place / owner / own.replace(".", "___")


def _hugging_face_folders(owner: str, own: str) -> Iterator[Path]:
    home = os.environ.get("HF_HOME")
    root = Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or root / "hub").expanduser()
    snapshots = hub / f"models--{owner}--{own}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)


def _addresses(release: Release) -> list[str]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE:
        return []
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    scope = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    found = [f"{mirror}/{release.repository}/resolve/main/{release.file}"] if mirror else []
    found.append(f"https://{scope}/models/{release.repository}/resolve/master/{release.file}")
    if not mirror:
        found.append(f"https://huggingface.co/{release.repository}/resolve/main/{release.file}")
    return found
