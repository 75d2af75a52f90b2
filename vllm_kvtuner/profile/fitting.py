"""Which shipped profiles are a model's."""

from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError


def fitting_profiles(shape: ModelShape) -> list[str]:
    """Names of the shipped profiles that were made for models of this shape; weights may be others."""
    names = []
    for name in shipped_profiles():
        profile = load_profile(name)
        if profile.model is None:
            continue
        try:
            profile.resolve(shape)
        except ProfileError:
            continue
        names.append(name)
    return names


def advice(shape: ModelShape) -> str:
    """Which profile to give instead of none, or of one that is not there."""
    if names := fitting_profiles(shape):
        return f"shipped profiles that fit {shape.name} are {', '.join(names)}"
    return f"no shipped profile fits {shape.name}: give a pair such as K8V8, or make one with kvtuner calibrate"
