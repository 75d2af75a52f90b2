"""Where a model's files lie on this machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_kvtuner.profile import hub
from vllm_kvtuner.profile.weights import weights_digest


@dataclass(frozen=True)
class ModelFiles:
    """A model that profiles are looked for with.

    Args:
        model: folder, or id on the hub.
        revision: of the hub's repository; None for its main branch.
        download_dir: folder of downloads, as vLLM's --download-dir; None for the hub's own cache.
        token: of an account on the hub; None for what the hub's library finds, such as HF_TOKEN.
    """

    model: str
    revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = None

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_dir()

    @cached_property
    def folder(self) -> Path | None:
        """The model's folder, or its snapshot in the cache of downloads; None where neither is here."""
        if self.is_folder:
            return Path(self.model)
        return hub.local_snapshot(self.model, self.revision, self.download_dir)

    @cached_property
    def weights(self) -> str | None:
        """Their digest; None where they are not on this machine."""
        return None if self.folder is None else weights_digest(self.folder)
