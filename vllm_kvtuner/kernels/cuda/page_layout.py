"""Bytes of a page for the kernels in C++: a header of constants, all from pages/layout.py."""

from vllm_kvtuner.pages.layout import PageLayout

HEADER = "page_layout.cuh"
"""Name under which a source includes the generated text."""


def page_layout(**layouts: PageLayout) -> str:
    """One struct of constants per layout, under the keyword's name."""
    return "".join(
        f"struct {name} {{  // {layout.pair}, head size {layout.head_size}, offsets and sizes in bytes\n"
        + "".join(f"  static constexpr int {constant} = {value};\n" for constant, value in layout.constants().items())
        + "};\n"
        for name, layout in layouts.items()
    )
