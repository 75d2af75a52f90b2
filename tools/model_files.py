"""Find a model's files and read its shape, without loading weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError


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
    """

    revision: str | None = None
    code_revision: str | None = None
    trust_remote_code: bool = False
    hf_config_path: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None


MODEL_AS_IT_IS = ModelSource()


def read_config(model: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """A model's config: the mapping in a folder's ``config.json``, or transformers' config of a model id.

    Raises:
        ProfileError: no such folder or model.
    """
    model = source.hf_config_path or model
    folder = Path(model)
    if not folder.is_dir():
        refuse_missing_folder(model)
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
    """The shape of a model folder or id.

    Raises:
        ProfileError: no such model, or its config does not give the shape.
    """
    config = read_config(model, source)
    try:
        return ModelShape.from_hf_config(config, model)
    except ProfileError:
        if not isinstance(config, dict):
            raise
        # A config.json may leave out what the model's config class has as defaults.
        return ModelShape.from_hf_config(load_config(model, source), model)


def max_positions(model: str, source: ModelSource = MODEL_AS_IT_IS) -> int:
    """Positions that a model folder or id was made for.

    Raises:
        ProfileError: no such model.
    """
    if isinstance(given := text_value(model, "max_position_embeddings", source), int):
        return given
    return load_config(model, source).get_text_config().max_position_embeddings


def refuse_missing_folder(model: str) -> None:
    """Refuse what can only be a folder and is none, before the hub is asked for a model of that name.

    Raises:
        ProfileError: no such folder.
    """
    is_path = model.startswith(("/", "./", "../", "~")) or model.endswith("/") or model.count("/") > 1
    if is_path and not Path(model).is_dir():
        got = "a file" if Path(model).is_file() else "no such folder"
        raise ProfileError([f"{model}: model must be a folder with a config.json, or the id of a model, but got {got}"])


def load_tokenizer(model: str, source: ModelSource = MODEL_AS_IT_IS) -> Any:
    """transformers' tokenizer of a model folder or id.

    Raises:
        ProfileError: none there.
    """
    from transformers import AutoTokenizer

    model = source.tokenizer or model
    revision = source.tokenizer_revision or source.revision
    given = {name: value for name, value in (("revision", revision), *_code(source)) if value}
    try:
        return AutoTokenizer.from_pretrained(model, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProfileError([f"{model}: model must have a tokenizer, but got {reason}"]) from None


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
    refuse_missing_folder(model)
    given = {name: value for name, value in (("revision", source.revision), *_code(source)) if value}
    try:
        return AutoConfig.from_pretrained(model, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProfileError([f"{model}: model must be a folder or the id of a model, but got {reason}"]) from None


def _code(source: ModelSource) -> tuple[tuple[str, Any], ...]:
    """Keywords of transformers on code that comes with a model."""
    return ("trust_remote_code", source.trust_remote_code), ("code_revision", source.code_revision)
