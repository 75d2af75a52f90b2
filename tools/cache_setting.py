"""One way to store the KV cache, as a measurement names it: a vLLM cache dtype, or ``kvtuner`` with a profile."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from vllm_kvtuner.engine.config import ATTEND_KEY, CALIBRATION_KEY, KV_CACHE_DTYPE, PROFILE_KEY, REQUEST_TOKENS_KEY
from vllm_kvtuner.profile.checkpoint import checkpoint_scheme, without_scheme
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import ModelShape

KVTUNER = KV_CACHE_DTYPE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSetting:
    """A ``--kv-cache-dtype`` and, for ``kvtuner`` alone, a precision profile.

    Args:
        kv_cache_dtype: as vLLM knows it.
        profile: file, name, or pair.
        attention_backend: vLLM's ``--attention-backend``, or None for its own choice.

    Raises:
        ValueError: kvtuner without a profile or with a backend, or a profile for another dtype.
    """

    kv_cache_dtype: str
    profile: str | None = None
    attention_backend: str | None = None

    def __post_init__(self) -> None:
        if not self.kv_cache_dtype:
            raise ValueError("a setting needs a KV cache dtype, but got an empty one")
        if (self.kv_cache_dtype == KVTUNER) != bool(self.profile):
            raise ValueError(
                "a setting is a KV cache dtype of vLLM such as auto or fp8, or kvtuner with a profile "
                f"such as kvtuner:K8V4, but got {self.label!r}"
            )
        if self.kv_cache_dtype == KVTUNER and self.attention_backend is not None:
            raise ValueError(f"a setting of kvtuner has an attention backend of its own, but got {self.label!r}")
        if self.attention_backend == "":
            raise ValueError(f"a setting needs an attention backend after @, but got {self.label!r}")

    @classmethod
    def parse(cls, text: str) -> "CacheSetting":
        """Read ``auto``, ``fp8``, ``fp8@FLASHINFER`` with a backend, or ``kvtuner:PROFILE``."""
        head, _, profile = text.partition(":")
        dtype, at, backend = head.partition("@")
        return cls(dtype, profile or None, backend if at else None)

    @property
    def label(self) -> str:
        backend = "" if self.attention_backend is None else f"@{self.attention_backend}"
        profile = f":{self.profile}" if self.profile else ""
        return f"{self.kv_cache_dtype}{backend}{profile}"

    def additional_config(
        self, *, attend_cached_prefill: bool = False, switchable: bool = False, request_tokens: int | None = None
    ) -> dict[str, Any]:
        """vLLM's ``additional_config`` for this setting; {} for vLLM's own dtypes.

        Args:
            attend_cached_prefill: True makes prefill read back what it stored, whatever the profile says, so that
                teacher-forced evaluation sees quantization; False leaves the choice to the profile.
            switchable: True lets pairs and transforms of layers change at run time.
            request_tokens: of the requests that a pair's window is chosen for; None for the engine's longest.
        """
        if self.profile is None:
            return {}
        config: dict[str, Any] = {PROFILE_KEY: self.profile}
        if attend_cached_prefill:
            config[ATTEND_KEY] = True
        if switchable:
            config[CALIBRATION_KEY] = True
        if request_tokens is not None:
            config[REQUEST_TOKENS_KEY] = request_tokens
        return config


AUTO = CacheSetting("auto")
"""The reference of every measurement: the unquantized cache."""


def unquantized_keywords(hf_config: Any, dtype: str) -> dict[str, Any]:
    """Keywords of vLLM's ``LLM`` with which ``auto`` is the model's dtype, whatever cache the checkpoint asks for.

    Args:
        hf_config: the model's configuration.
        dtype: of the model, as ``LLM`` takes it.
    """
    scheme = checkpoint_scheme(hf_config)
    if scheme is None:
        return {}
    logger.warning(
        "the checkpoint asks for a quantized KV cache (%s); auto is the unquantized cache here, in the model's dtype",
        scheme,
    )
    if scheme.has_scales_per_head and dtype in ("bfloat16", "float16"):
        return {"kv_cache_dtype": dtype}  # without the scheme vLLM would look for one scale per layer
    return {"hf_overrides": without_scheme(hf_config)}


def cache_bits(setting: CacheSetting, hf_config: Any, model: str, unquantized_bits: int) -> tuple[float, float] | None:
    """Nominal and stored bits per cached number, or None for a dtype of vLLM whose scales it lays out itself.

    Args:
        setting: the KV cache dtype and profile.
        hf_config: the model's transformers config, or its shape.
        model: its name for error messages.
        unquantized_bits: width of the model's dtype, which ``auto`` caches.

    Raises:
        ProfileError: the profile cannot be read or does not fit the model.
    """
    if setting.profile is not None:
        shape = hf_config if isinstance(hf_config, ModelShape) else ModelShape.from_hf_config(hf_config, model)
        resolved = load_profile(setting.profile).resolve(shape)
        return resolved.nominal_bits, resolved.stored_bits
    if setting.kv_cache_dtype == "auto":
        return float(unquantized_bits), float(unquantized_bits)
    if setting.kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        return 8.0, 8.0
    return None


def profile_sha256(setting: CacheSetting) -> str | None:
    """Hex SHA-256 of the bytes of a setting's profile and its statics; None where there is no file.

    Raises:
        ProfileError: the profile cannot be read.
    """
    if setting.profile is None:
        return None
    profile = load_profile(setting.profile)
    files = [path for path in (profile.source, profile.statics) if path is not None]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else None
