"""Turn a GGUF file into a plain transformers model folder in bf16, which vLLM serves."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

COPY_TOLERANCE = 0.1
"""Relative Frobenius distance below which two embedding matrices are quantized copies of one (5-bit blocks: 0.04)."""


def convert_gguf(gguf_path: Path, out_folder: Path) -> None:
    """Dequantize a GGUF model to bf16 and write it, with its tokenizer and chat template, as a model folder.

    The folder appears at once, complete, or not at all. A tied embedding that the file stores twice at different
    widths is tied again to the copy with more bits.

    Args:
        gguf_path: the GGUF file, of an architecture that transformers reads.
        out_folder: the folder to make; its parent is made where missing.

    Raises:
        FileNotFoundError: no file at gguf_path.
        FileExistsError: out_folder exists.
        ValueError: the file holds no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_path, out_folder = Path(gguf_path), Path(out_folder)
    if not gguf_path.is_file():
        raise FileNotFoundError(f"{gguf_path}: no such GGUF file")
    if out_folder.exists():
        raise FileExistsError(f"{out_folder}: exists; delete it to convert again")

    source = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf_path}: tokenizer.chat_template is missing; a chat model is needed")
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    _tie_copies(model, gguf_path)
    model.to(torch.bfloat16)
    # transformers refuses to save a model that it read from GGUF while it counts as quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16

    out_folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_folder.name}.", dir=out_folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(out_folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _tie_copies(model: Any, gguf_path: Path) -> None:
    """Tie input and output embedding to the copy stored with more bits, where the file holds the same matrix twice."""
    import torch
    from gguf import GGUFReader

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight or embedding.weight.shape != head.weight.shape:
        return
    with torch.no_grad():
        distance = (embedding.weight - head.weight).norm() / head.weight.norm()
        if distance > COPY_TOLERANCE:
            return
        stored_bytes = {tensor.name: tensor.n_bytes for tensor in GGUFReader(str(gguf_path)).tensors}
        if stored_bytes["output.weight"] >= stored_bytes["token_embd.weight"]:
            embedding.weight.copy_(head.weight)
    model.config.tie_word_embeddings = True
    model.tie_weights()
