"""The folder that keeps compiled kernels between processes; needs no CUDA."""

import os
import stat
from pathlib import Path

from vllm_kvtuner import envs

VARIABLE = "KVTUNER_KERNEL_CACHE"
ENTRIES = "entries"
"""Where cuda.core keeps what was compiled."""
LIBRARIES = "cpu"
"""Where kernels/cpu keeps its libraries."""


def make() -> Path:
    """Make the folder where it is missing, and check that only its owner can put kernels into it.

    Raises:
        ValueError: it cannot be made, belongs to somebody else, or others may write to it: what it holds runs.
    """
    folder = envs.kernel_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check(folder)
        # cuda.core would make it as the umask says, which often lets the user's group write.
        for inner in (ENTRIES, LIBRARIES):
            (folder / inner).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise unusable(error) from error
    return folder


def check(folder: Path) -> None:
    """Refuse a folder, or what is kept in it, that somebody else could write to.

    Raises:
        ValueError: with path, rule and owner.
    """
    for path in (folder, folder / ENTRIES, folder / LIBRARIES):
        if not path.exists():
            continue
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(
                f"{VARIABLE}: {path} must belong to user {os.geteuid()} and be writable by no other, but "
                f"belongs to {status.st_uid} with mode {stat.filemode(status.st_mode)}"
            )


def unusable(error: OSError) -> ValueError:
    """The user's error for a folder that cannot be read or written."""
    reason = error.strerror or str(error)
    return ValueError(f"{VARIABLE}: {envs.kernel_cache()} must be a writable folder with room, but got {reason}")
