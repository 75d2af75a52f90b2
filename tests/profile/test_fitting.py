"""Which shipped profiles a refusal offers."""

import dataclasses

from vllm_kvtuner.profile.fitting import advice, fitting_profiles
from vllm_kvtuner.profile.load import load_profile, shipped_profiles


def test_profiles_of_a_models_shape_and_no_others():
    shape = load_profile("llama31_3.25bit").model
    assert fitting_profiles(shape) == [name for name in shipped_profiles() if name.startswith("published/llama31_")]
    assert advice(shape).startswith(f"shipped profiles that fit {shape.name} are published/llama31_3.25bit, ")
    finetune = dataclasses.replace(shape, name="a fine-tune")
    assert fitting_profiles(finetune) == fitting_profiles(shape), "the name does not matter"


def test_a_model_without_a_profile_is_told_what_to_do():
    shape = load_profile("llama31_3.25bit").model
    other = dataclasses.replace(shape, layers=shape.layers[:5])
    assert fitting_profiles(other) == []
    assert "no shipped profile fits" in advice(other) and "kvtuner calibrate" in advice(other)
