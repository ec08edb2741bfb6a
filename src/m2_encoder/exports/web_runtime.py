"""ONNX Runtime for browsers, fetched once from npm: `python -m m2_encoder.exports.web_runtime`.

It is Microsoft's work under the MIT licence and not part of this package. Two of its files are kept, 14 MB of the 33 MB
that are fetched, and known by their checksums.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from m2_encoder.checkpoints.download import cache_folder
from m2_encoder.errors import UserError, abridge
from m2_encoder.files import atomic_folder, file_sha256

VERSION: Final = "1.30.0"
PACKAGE: Final = f"onnxruntime-web@{VERSION}"
SCRIPT: Final = "ort.wasm.bundle.min.mjs"
WASM: Final = "ort-wasm-simd-threaded.wasm"

_SUMS: Final = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_TIMEOUT_S: Final = 600


def runtime_folder() -> Path:
    """Where it is kept: below the cache of downloads."""
    return cache_folder() / PACKAGE.replace("@", "-")


def runtime_rule(folder: Path) -> str:
    """What is wrong with a folder of the two files; empty if nothing is."""
    missing = [name for name in _SUMS if not (folder / name).is_file()]
    if missing:
        return f"{PACKAGE} is not there ({', '.join(missing)} missing)"
    changed = [name for name, digest in _SUMS.items() if file_sha256(folder / name) != digest]
    return f"{', '.join(changed)} is not that of {PACKAGE}" if changed else ""


def fetch_runtime(folder: Path) -> None:
    """Fetches it by npm, which obeys the registry and the proxy that it is set to, unless it is there.

    Raises:
        UserError: without npm, without network, or if other files come than expected.
    """
    if folder.is_dir() and not runtime_rule(folder):
        return
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"npm is not installed; {PACKAGE} comes from there")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, cwd=scratch)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm pack {PACKAGE} did not end within {_TIMEOUT_S} s") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"npm pack {PACKAGE} failed: {abridge(said[0], 300)}")
        (archive,) = Path(scratch).glob("*.tgz")
        with atomic_folder(folder, overwrite=True) as partial, tarfile.open(archive) as packed:
            for name in _SUMS:
                content = packed.extractfile(f"package/dist/{name}")
                assert content is not None
                (partial / name).write_bytes(content.read())
            if rule := runtime_rule(partial):
                raise UserError(rule)


def main() -> int:
    """Fetches it and says where it is; 2 if that fails."""
    folder = runtime_folder()
    try:
        fetch_runtime(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{PACKAGE} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
