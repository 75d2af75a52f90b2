"""Classes by which vLLM tells layers of unlike pairs apart."""

from vllm_kvtuner.attention.backend import backend_for
from vllm_kvtuner.pages.layout import PrecisionPair


def test_backends_are_one_class_per_pair():
    pairs = [PrecisionPair(8, 4), PrecisionPair(4, 2)]
    classes = [backend_for(pair) for pair in pairs]
    assert [cls.pair for cls in classes] == pairs
    assert backend_for(PrecisionPair(8, 4)) is classes[0]
    assert len({cls.full_cls_name() for cls in classes}) == 2
