"""Find a model's files and read its shape, without loading weights."""

import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtuner_tools.vllm_logs import importing_vllm, results_alone_on_stdout
from vllm_kvtuner.engine.config import KV_CACHE_DTYPE, PROFILE_KEY
from vllm_kvtuner.engine.verdict import model_shape
from vllm_kvtuner.pages.layout import UNQUANTIZED
from vllm_kvtuner.plugin import register
from vllm_kvtuner.profile.hub import refuse_unknown_model
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's config and tokenizer come from, where that is not the model's name alone; as vLLM names it.

    Args:
        revision: branch, tag or commit of a model id.
        code_revision: likewise, of the code that comes with a model.
        trust_remote_code: whether that code may run.
        hf_config_path: folder or id that has the config instead.
        tokenizer: folder or id that has the tokenizer instead.
        tokenizer_revision: as ``revision``, of the tokenizer.
        download_dir: where a hub's files of the model are kept.
        arguments: further engine arguments, by vLLM's names, which its verdict may depend on.
    """

    revision: str | None = None
    code_revision: str | None = None
    trust_remote_code: bool = False
    hf_config_path: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


MODEL_AS_IT_IS = ModelSource()


def read_config(model: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """A model's config: the mapping in a folder's ``config.json``, or transformers' config of a model id.

    Raises:
        ProfileError: no such folder or model.
    """
    model = source.hf_config_path or model
    folder = Path(model)
    if not folder.is_dir():
        refuse_missing_model(model, source)
        return load_config(model, source)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError([f"{model}: model must be a folder with a config.json, but got one without"]) from None
    except ValueError as error:
        raise ProfileError([f"{path}: the file must be JSON, but got {error}"]) from None
    if not isinstance(config, dict):
        raise ProfileError([f"{path}: the file must hold a JSON object, but got {type(config).__name__}"])
    return config


def load_model_shape(model: str, source: ModelSource = MODEL_AS_IT_IS) -> ModelShape:
    """The shape of a model folder or id, with vLLM's reading of it and the engine's own verdict.

    Returns:
        The shape; its ``unsupported`` says why the engine would refuse any profile.

    Raises:
        ProfileError: no such model, vLLM does not read its configuration, or an engine with these arguments would not
            serve it whatever the profile.
    """
    name = source.hf_config_path or model
    refuse_missing_model(name, source)
    if Path(name).is_dir():
        read_config(model, source)
    try:
        with importing_vllm():
            from vllm.engine import arg_utils
    except ImportError as error:
        logger.warning("vLLM cannot be imported (%s): %s is read and checked without it", error, model)
        return shape_of_values(model, source)
    with results_alone_on_stdout():
        register()
        return _shape_of_engine(model, source, arg_utils.EngineArgs(**_engine_keywords(model, source)))


def shape_of_values(model: str, source: ModelSource = MODEL_AS_IT_IS) -> ModelShape:
    """The shape as the configuration's values alone say it, for what starts no engine."""
    config = read_config(model, source)
    try:
        return ModelShape.from_hf_config(config, model)
    except ProfileError:
        if not isinstance(config, dict):
            raise
        # A config.json may leave out what the model's config class has as defaults.
        return ModelShape.from_hf_config(load_config(model, source), model)


def _engine_keywords(model: str, source: ModelSource) -> dict[str, Any]:
    """vLLM's EngineArgs of an engine with a profile that any served model takes."""
    given = {name: value for name, value in vars(source).items() if name != "arguments" and value}
    own = {
        "model": model,
        "skip_tokenizer_init": True,
        "kv_cache_dtype": KV_CACHE_DTYPE,
        "additional_config": {PROFILE_KEY: UNQUANTIZED.name},
    }
    if Path(source.hf_config_path or model).is_dir():
        config = read_config(model, source)
        parts = (config, config.get("text_config") or {})
        if not any(part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
            # Or vLLM looks for it in the weights, which the verdict does not depend on.
            overrides = source.arguments.get("hf_overrides") or {}
            own["hf_overrides"] = {"dtype": "float32", **overrides} if isinstance(overrides, Mapping) else overrides
    return {**source.arguments, **given, **own}


def _shape_of_engine(model: str, source: ModelSource, arguments: Any) -> ModelShape:
    """As the engine's own check has it."""
    try:
        shape = model_shape(arguments.create_model_config())
    except ProfileError:
        raise
    except Exception as error:  # configurations that it does not read end in errors of many kinds
        rule = "model must be one that vLLM reads"
        problems = [f"{model}: {rule}, but got {_first_line(error)}"]
        raise ProfileError([*problems, *_refusals_of_values(model, source)]) from None
    if shape.unsupported:
        return shape
    try:
        arguments.create_engine_config()
    except ProfileError as error:
        raise ProfileError(problem.removeprefix(f"{UNQUANTIZED.name}: ") for problem in error.problems) from None
    except RuntimeError as error:  # a machine without a device that this vLLM serves
        logger.warning("%s: what depends on the device was not checked: %s", model, _first_line(error))
    except ValueError as error:
        raise ProfileError(
            [f"{model}: model must be one that vLLM serves here, but got {_first_line(error)}"]
        ) from None
    return shape


def _refusals_of_values(model: str, source: ModelSource) -> tuple[str, ...]:
    """Why a model that vLLM does not read here would not be served where it does, as far as its values say."""
    try:
        return shape_of_values(model, source).refusals
    except ProfileError:
        return ()


def _first_line(error: Exception) -> str:
    """What an error says, without the frame that pydantic puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "error, " in line), lines[0] if lines else "")
    text = said.partition("error, ")[2] or said
    return f"{type(error).__name__}: {text.partition(' [type=')[0]}"


def max_positions(model: str, source: ModelSource = MODEL_AS_IT_IS) -> int:
    """Positions that a model folder or id was made for.

    Raises:
        ProfileError: no such model.
    """
    if isinstance(given := text_value(model, "max_position_embeddings", source), int):
        return given
    return load_config(model, source).get_text_config().max_position_embeddings


def refuse_missing_model(model: str, source: ModelSource) -> None:
    """Refuse what can only be a folder and is none, and what neither the hub nor its cache has.

    Raises:
        ProfileError: no such folder or model.
    """
    if Path(model).is_dir():
        return
    if model.startswith(("/", "./", "../", "~")) or model.endswith("/") or model.count("/") > 1:
        got = "a file" if Path(model).is_file() else "no such folder"
        raise ProfileError([f"{model}: model must be a folder with a config.json, or the id of a model, but got {got}"])
    if not os.environ.get("VLLM_USE_MODELSCOPE"):  # another hub
        refuse_unknown_model(model, source.revision, source.download_dir)


def load_tokenizer(model: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """transformers' tokenizer of a model folder or id.

    Raises:
        ProfileError: none there.
    """
    model = source.tokenizer or model
    revision = source.tokenizer_revision or source.revision
    given = tuple((name, value) for name, value in (("revision", revision), *_code(source)) if value)
    try:
        return _tokenizer(model, given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProfileError([f"{model}: model must have a tokenizer, but got {reason}"]) from None


@functools.cache
def _tokenizer(model: str, given: tuple[tuple[str, Any], ...]) -> Any:
    """A large vocabulary takes a second, and several stages ask."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, **dict(given))


def text_value(model: str, name: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """A value of a model's config, or of its text part; None where it is not given.

    Raises:
        ProfileError: no such model.
    """
    config = read_config(model, source)
    if not isinstance(config, dict):
        return getattr(config.get_text_config(), name, None)
    return (config.get("text_config") or config).get(name, config.get(name))


def refuse_model_folder(model: str, folder: Path) -> None:
    """Refuse to write statics where vLLM would read them as weights: beside the model's own.

    Raises:
        ProfileError: the folder is the model's.
    """
    if Path(model).is_dir() and folder.resolve() == Path(model).resolve():
        rule = "--out must not be in the model's folder, where vLLM takes every safetensors file for weights"
        raise ProfileError([f"{folder}: {rule}, but got {model!r}"])


def load_config(model: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """transformers' config of a model folder or id.

    Raises:
        ProfileError: none there.
    """
    from transformers import AutoConfig

    model = source.hf_config_path or model
    refuse_missing_model(model, source)
    given = {name: value for name, value in (("revision", source.revision), *_code(source)) if value}
    try:
        return AutoConfig.from_pretrained(model, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProfileError([f"{model}: model must be a folder or the id of a model, but got {reason}"]) from None


def _code(source: ModelSource) -> tuple[tuple[str, Any], ...]:
    """Keywords of transformers on code that comes with a model."""
    return ("trust_remote_code", source.trust_remote_code), ("code_revision", source.code_revision)
