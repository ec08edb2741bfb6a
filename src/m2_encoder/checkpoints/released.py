"""The released weights of M2-Encoder by name, and their tokenizer: in folders of this machine first, then from hubs.

Nothing here was tried against the hubs themselves; which repositories hold them is what the official code says.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from m2_encoder.checkpoints.download import cache_folder, download, drop_part, find_downloaded
from m2_encoder.checkpoints.weight_files import check_download
from m2_encoder.errors import CheckpointError, UserError

FOLDER_VARIABLE: Final = "M2_ENCODER_WEIGHTS"
"""Environment variable that names a folder of released files."""

TOKENIZER_FILE: Final = "sp.model"
"""The official tokenizer, one for all weights."""

TOKENIZER_SHA256: Final = "b7fe3bcc8d284fcb782691411e8b6fd4f45d7245565b094de6ab795e66bcd32f"
"""Of that file in the repository of the official code; one from a hub must be the same."""

_TOKENIZER_PLACES: Final = (TOKENIZER_FILE, f"vlmo/tokenizer/{TOKENIZER_FILE}")
"""In the folder of released weights, and in that of the official code, which may hold them, too."""

_TOKENIZER_SOURCE: Final = (
    "https://raw.githubusercontent.com/alipay/Ant-Multi-Modal-Framework/main/prj/M2_Encoder/vlmo/tokenizer/sp.model"
)
_TOKENIZER_TIMEOUT_S: Final = 10.0  # of silence; pictures can be encoded without it
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
        CheckpointError: if no place has it, naming each and what it said. After a download that broke off the others
            are asked, too; if none has it, the same call continues it.
        UserError: if `M2_ENCODER_WEIGHTS` is no folder.
    """
    release = RELEASES[name]
    local = (folder / release.file for folder in _folders(release))
    if (found := next(filter(Path.is_file, local), None)) is not None:
        return found
    urls = [f"{hub}/{release.file}" for hub in _hubs(release)]
    fetch = functools.partial(download, check=check_download)
    fix = f"{_advise_folder()} HF_ENDPOINT to a mirror, or pass weights={release.file!r}"
    random = "A model with random weights is M2Encoder(config)"
    return _fetch(f"{name}: {release.file}", urls, fetch, fix=f"{fix}. {random}")


def _advise_folder() -> str:
    """What to do with the folder of released files that is set, or is not."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return f"put it into {FOLDER_VARIABLE}={named}, set"
    return f"set {FOLDER_VARIABLE}{'' if named is None else ', which is empty,'} to its folder,"


def find_release_tokenizer(name: str, weights: Path) -> Path:
    """The official tokenizer for released weights: one on this machine, or a download.

    Looked for beside the weights, then where `find_release` looks for weights, of all releases, and fetched from the
    same hubs, and from the repository of the official code.

    Raises:
        CheckpointError: if no place has it, naming each and what it said.
        UserError: if `M2_ENCODER_WEIGHTS` is no folder.
    """
    folders = [weights.parent, *(folder for release in RELEASES.values() for folder in _folders(release))]
    for place in (folder / place for folder in folders for place in _TOKENIZER_PLACES):
        if place.is_file():
            return place
    urls = [f"{hub}/{place}" for hub in _hubs(RELEASES[name]) for place in _TOKENIZER_PLACES]
    urls = [f"{url}#sha256={TOKENIZER_SHA256}" for url in [*urls, _TOKENIZER_SOURCE]]
    fetch = functools.partial(download, timeout_s=_TOKENIZER_TIMEOUT_S)
    return _fetch(f"{name}: {TOKENIZER_FILE}", urls, fetch, fix=f"put it beside {weights}, or pass tokenizer=FILE")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids to fetch anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE


def _fetch(what: str, urls: Sequence[str], fetch: Callable[[str], Path], *, fix: str) -> Path:
    """A file from the first address that has it, of which an earlier download counts.

    Raises:
        CheckpointError: naming all of them.
    """
    for url in urls:
        if (found := find_downloaded(url)) is not None:
            return found
    failed = []
    for url in () if is_offline() else urls:
        try:
            fetched = fetch(url)
        except CheckpointError as error:
            failed.append(error.text.removeprefix("cannot download ").removeprefix("cannot use "))
            continue
        for other in urls:
            drop_part(other)
        return fetched
    tried = "; ".join(failed) if failed else "no hub is asked, as HF_HUB_OFFLINE is set"
    raise CheckpointError(f"{what} is not on this machine, and could not be fetched ({tried}); {fix}")


def _folders(release: Release) -> Iterator[Path]:
    """Where files of a release may lie on this machine."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named and not Path(named).expanduser().is_dir():
        raise UserError("no such folder; give the one that holds the released files", key=FOLDER_VARIABLE, value=named)
    roots = [Path(named).expanduser()] if named else []
    owner, own = release.repository.split("/")
    yield from (folder for root in roots for folder in (root, root / own, root / owner / own))
    yield from _modelscope_folders(owner, own)
    yield from _hugging_face_folders(owner, own)
    yield cache_folder()


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


def _hubs(release: Release) -> list[str]:
    """Addresses that names of files of a release are added to."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    scope = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    modelscope = f"https://{scope}/models/{release.repository}/resolve/master"
    hugging_face = f"{mirror or 'https://huggingface.co'}/{release.repository}/resolve/main"
    return [hugging_face, modelscope] if mirror else [modelscope, hugging_face]
