"""What a model makes of errors of its attention outputs: Grams of the weights that read the residual stream after them.

No architecture is named here: one window is run, and hooks note which layers read the output of which norm, and which
of them takes an attention layer's output. An error r of the residual stream moves what the readers of a later norm see
by about gain * r / rms, and their outputs by their weights times that. With the mean over a reader's rows, and the
variance of the logits under the model's own predictions at the end,

    M = sum over later readers of diag(gain) W^T W diag(gain) / (rows * mean square) + that of the logits

and G_hh' = W_h^T M W_h' of the heads' parts of the output projection. Weights are read by what layers do to the
identity, so that quantized ones need no case of their own.

Of an engine's ranks each has a part of every weight: a rank's part of a reader is some of the weight's rows, whose sums
come together; of an output projection it is some of its columns, which each rank in turn makes known to all. A pipeline
stage goes on with the sum of the stages behind it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvtuner_tools.calibration.captured import CapturedLayer, gram_file, save_tensors
from kvtuner_tools.engines.ranks import from_first, num_ranks, whole_sum, writes

NORMS_AT_ONCE = 4
"""Newest outputs of norms that are kept, so that nothing else lies in their memory before their readers have run."""
FIRST_TOKENS = 4
"""Tokens at the head of a text whose residual stream, where they are attention sinks, is unlike all others'."""
ROWS_AT_ONCE = 8192
"""Rows of a weight that are multiplied at once."""
_DENSE = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(NamedTuple):
    """A norm that ran.

    Args:
        step: its place among norms and output projections.
        gain: [hidden_size] fp32 that it multiplies by.
        square: mean square of its input, the geometric mean over tokens.
        output: [num_tokens, hidden_size], what it gave.
    """

    step: int
    gain: torch.Tensor
    square: float
    output: torch.Tensor


class _Reader(NamedTuple):
    """A layer that read a norm's output, and what is needed of that."""

    module: torch.nn.Module
    step: int
    gain: torch.Tensor
    square: float


class _Projection(NamedTuple):
    """An attention layer's output projection that ran.

    Args:
        module: the projection.
        step: as in _Norm.
        last_row: of its output, by which a norm right behind it is known.
        gain: [hidden_size] fp32 of that norm, or 1.0.
    """

    module: torch.nn.Module
    step: int
    last_row: torch.Tensor
    gain: torch.Tensor | float = 1.0


class ResidualReaders:
    """Notes what one window of text runs through, in the worker, from :meth:`watch` to :meth:`write`."""

    def __init__(self) -> None:
        self._hidden_size = self._step = 0
        self._norms: dict[int, _Norm] = {}
        self._readers: list[_Reader] = []
        self._attended: tuple[int, torch.Tensor] | None = None
        self._projections: dict[int, _Projection] = {}
        self._layers: list[int] = []
        self._hooks: list[Any] = []

    def watch(self, model: torch.nn.Module, hidden_size: int, attention: Mapping[int, torch.nn.Module]) -> None:
        """Hook the norms and readers of a model, and these attention layers, by their index."""
        from vllm.model_executor.layers.linear import LinearBase

        self._hidden_size, self._layers = hidden_size, list(attention)
        for module in model.modules():
            if _is_norm(module, hidden_size):
                self._hooks.append(module.register_forward_hook(self._on_norm, with_kwargs=True))
            elif isinstance(module, LinearBase) or hasattr(module, "w13_weight"):
                self._hooks.append(module.register_forward_hook(self._on_reader, with_kwargs=True))
        for index, layer in attention.items():
            self._hooks.append(layer.register_forward_hook(self._on_attention(index)))

    def write(self, model: Any, layers: tuple[CapturedLayer, ...], folder: Path) -> str | None:
        """Take the hooks off and write every layer's Gram. All ranks must do so at once.

        Takes twice hidden_size^2 numbers in fp32, and one weight beside those of the model.

        Args:
            model: this rank's.
            layers: of the whole model.
            folder: the capture's.

        Returns:
            Why that cannot be done, or None.
        """
        from vllm.distributed import get_pp_group

        for hook in self._hooks:
            hook.remove()
        stages, device = get_pp_group(), next(model.parameters()).device
        gram, problem = torch.zeros(self._hidden_size, self._hidden_size, device=device), None
        for stage in reversed(range(stages.world_size)):
            if stages.rank_in_group == stage:
                try:
                    mine = [layer for layer in layers if layer.index in self._layers]
                    if missing := [layer.index for layer in mine if layer.index not in self._projections]:
                        rule = "attention outputs must go straight into a projection"
                        raise ValueError(f"{rule}, but those of layers {missing} do not")
                    gram = self._write(self._logits_gram(model) if stages.is_last_rank else gram, mine, folder)
                except ValueError as error:
                    problem = str(error)
            if stages.world_size > 1:
                problem = stages.broadcast_object(problem, src=stage)
            if problem is not None:
                return problem
            if stage > 0:
                gram = stages.broadcast(gram, src=stage)
        return None

    def _write(self, gram: torch.Tensor, layers: list[CapturedLayer], folder: Path) -> torch.Tensor:
        """Write the Grams of this stage's layers.

        Args:
            gram: [hidden_size, hidden_size] fp32 of what reads the stream behind this stage.
            layers: of this stage.
            folder: the capture's.

        Returns:
            ``gram`` with all readers of this stage.

        Raises:
            ValueError: why that cannot be done.
        """
        readers = list(self._readers)
        for layer in sorted(layers, key=lambda each: -self._projections[each.index].step):
            projection = self._projections[layer.index]
            while readers and readers[-1].step > projection.step:
                gram += _reader_gram(readers.pop())
            tensors = {"output_gram": _output_gram(projection, layer, gram).cpu()}
            if writes():
                save_tensors(gram_file(folder, layer.index), tensors)
        while readers:
            gram += _reader_gram(readers.pop())
        return gram

    def _on_attention(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            self._attended = index, output

        return hook

    def _on_norm(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Of norms that add the residual stream, the second output is what they have read."""
        is_pair = isinstance(output, tuple)
        normed, stream = output if is_pair else (output, args[0] if args else next(iter(kwargs.values())))
        if normed.shape[-1] != self._hidden_size:
            return
        gain = _gain(module, stream)
        for index, projection in self._projections.items():
            if not is_pair and torch.equal(stream.reshape(-1, self._hidden_size)[-1], projection.last_row):
                # Not of the stream, but between the projection and the stream.
                scale = stream.float().square().mean(-1).sqrt().log().mean().exp()
                self._projections[index] = projection._replace(gain=gain / scale)
                return
        squares = stream.reshape(-1, self._hidden_size)[FIRST_TOKENS:].float().square().mean(-1)
        self._norms[normed.data_ptr()] = _Norm(self._next(), gain, float(squares.log().mean().exp()), normed)
        if len(self._norms) > NORMS_AT_ONCE:
            del self._norms[min(self._norms, key=lambda each: self._norms[each].step)]

    def _on_reader(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        rows = args[0] if args else next(iter(kwargs.values()))
        if self._attended is not None and rows.data_ptr() == self._attended[1].data_ptr():
            index, _ = self._attended
            given = output[0] if isinstance(output, tuple) else output
            if given.shape[-1] == self._hidden_size:
                self._projections[index] = _Projection(module, self._next(), given[-1].clone())
            self._attended = None
        elif (norm := self._norms.get(rows.data_ptr())) is not None and rows.shape[-1] == self._hidden_size:
            self._readers.append(_Reader(module, norm.step, norm.gain, norm.square))

    def _next(self) -> int:
        self._step += 1
        return self._step

    def _logits_gram(self, model: Any) -> torch.Tensor:
        """[hidden_size, hidden_size] fp32: variance of the logits, under the predictions, by errors of the stream."""
        last = max(self._norms.values(), key=lambda each: each.step)
        head: Any = next((each.lm_head for each in _parts(model) if hasattr(each, "lm_head")), None)
        weight = getattr(head, "weight", None)
        if weight is None or weight.dtype not in _DENSE or weight.shape[-1] != self._hidden_size:
            raise ValueError(f"the model must have an unquantized lm_head, but has {type(head).__name__}")
        rows = last.output[FIRST_TOKENS:]
        parts = [model.compute_logits(part) for part in rows.split(64)]  # None on ranks that are not the first
        likely = torch.stack([part.float().softmax(-1).sum(0) for part in parts]).sum(0).cpu() if writes() else None
        likely = from_first(likely).to(weight.device) / len(rows)
        # This rank's part of the vocabulary.
        first, end = (
            (head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index)
            if num_ranks() > 1
            else (0, len(likely))
        )
        likely = likely[first:end]
        gram = torch.zeros(self._hidden_size, self._hidden_size, device=weight.device)
        mean = torch.zeros(self._hidden_size, device=weight.device)
        for each, share in zip(weight[: len(likely)].split(ROWS_AT_ONCE), likely.split(ROWS_AT_ONCE), strict=True):
            rows = each.float()
            gram += (rows * share[:, None]).mT @ rows
            mean += share @ rows
        gram, mean = whole_sum(gram), whole_sum(mean)
        gram -= torch.outer(mean, mean)
        return gram * last.gain[:, None] * last.gain / last.square


def _is_norm(module: torch.nn.Module, hidden_size: int) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and weight.shape == (hidden_size,)


def _gain(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    """[hidden_size] fp32: what a norm multiplies by, whether it stores it, or by how much it is off 1."""
    if "RMS" in type(norm).__name__:
        return norm.forward(torch.ones_like(rows.reshape(-1, rows.shape[-1])[:1]))[0].float()
    return norm.weight.float()


def _parts(model: Any) -> list[Any]:
    """The model, and the language model inside of one that sees or hears."""
    inner = model.get_language_model() if hasattr(model, "get_language_model") else None
    return [each for each in (model, inner) if each is not None]


def _reader_gram(reader: _Reader) -> torch.Tensor:
    """[hidden_size, hidden_size] fp32 of one reader."""
    size, device = len(reader.gain), reader.gain.device
    if (experts := getattr(reader.module, "w13_weight", None)) is not None:
        if experts.dtype not in _DENSE:
            raise ValueError(f"experts must be unquantized, but are {experts.dtype}")
        parts, shares = experts.unbind(0), torch.ones(experts.shape[0] * experts.shape[1], device=device)
    else:
        weight = _transposed(reader.module, size, device)
        parts, shares = weight.mT.split(ROWS_AT_ONCE), _shares(reader.module, weight.shape[1], device)
    gram = torch.zeros(size, size, device=device)
    for part, share in zip(parts, shares.split([len(part) for part in parts]), strict=True):
        rows = part.float()
        gram += (rows * share[:, None]).mT @ rows
    count = float(whole_sum(shares.sum().view(1)))
    return whole_sum(gram) * reader.gain[:, None] * reader.gain / (count * reader.square)


def _shares(module: Any, num_rows: int, device: torch.device) -> torch.Tensor:
    """[num_rows]: the part of each row of a rank's weight that counts, where other ranks have the same rows.

    What all ranks have whole counts as often as all else of its weight; only KV heads are on some ranks beside queries.
    """
    shares = torch.ones(num_rows, device=device)
    if (copies := getattr(module, "num_kv_head_replicas", 1)) > 1:
        shares[module.num_heads * module.head_size :] /= copies
    return shares


def _output_gram(projection: _Projection, layer: CapturedLayer, gram: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, group, head_size, group, head_size] fp32 of a layer, for the Gram of what reads the stream."""
    group, size = layer.num_heads // layer.num_kv_heads, layer.head_size
    weight = _whole_projection(projection.module, layer.num_heads * size, gram.device).float() * projection.gain
    parts = [part @ gram @ part.mT for part in weight.split(group * size)]
    return torch.stack([(part + part.mT) / 2 for part in parts]).view(-1, group, size, group, size)


def _whole_projection(module: Any, size: int, device: torch.device) -> torch.Tensor:
    """[size, hidden_size]: an output projection as it works, of all ranks' heads.

    Each rank's part is made known to all by a pass in which the others give zeros, which vLLM adds up.

    Raises:
        ValueError: a projection that is not split over the ranks by heads.
    """
    if num_ranks() == 1:
        return _transposed(module, size, device)
    from vllm.distributed import get_tensor_model_parallel_rank

    if not getattr(module, "input_is_parallel", False):
        raise ValueError(f"output projections must be split over ranks by heads, but {type(module).__name__} is not")
    local = size // num_ranks()
    turns = [
        _transposed(module, local, device, is_zero=rank != get_tensor_model_parallel_rank())
        for rank in range(num_ranks())
    ]
    whole = torch.cat(turns)
    return whole if module.reduce_results else whole_sum(whole)


def _transposed(module: Any, size: int, device: torch.device, *, is_zero: bool = False) -> torch.Tensor:
    """[size, outputs]: a linear layer's weight as it works, quantized or not, by what it makes of the identity.

    Args:
        module: the layer.
        size: inputs.
        device: of the result.
        is_zero: take zeros for the identity, where this is another rank's turn.
    """
    dtype = next((each.dtype for each in module.parameters() if each.dtype in _DENSE), torch.get_default_dtype())

    def output(rows: torch.Tensor) -> torch.Tensor:
        result = module.forward(rows)
        return result[0] if isinstance(result, tuple) else result

    rows = torch.eye(size, dtype=dtype, device=device) * (not is_zero)
    return torch.cat([output(part) for part in rows.split(512)]) - output(torch.zeros_like(rows[:1]))
