"""The proxy between a prefilling and a decoding server: what each is asked, and what a client sees when one is gone."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kvtuner_tools.prefill_proxy import make_app

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]]}
BODY = {"model": "m", "prompt": "Hello", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}


def server(answer):
    asked = []

    async def completions(request):
        asked.append((await request.json(), dict(request.headers)))
        return answer()

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server"), asked


def gone():
    def refuse(request):
        raise httpx.ConnectError("connection refused")

    return httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://server")


def post(prefill, decode, body=BODY):
    async def ask():
        transport = httpx.ASGITransport(make_app(prefill, decode))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post("/v1/completions", json=body, headers={"Authorization": "Bearer key"})

    return asyncio.run(ask())


def prefilled():
    return JSONResponse({"choices": [{"text": "x"}], "kv_transfer_params": PARAMS})


def test_one_computes_the_prompt_and_the_other_gets_its_pages():
    async def parts():
        for part in (b"data: a\n\n", b"data: [DONE]\n\n"):
            yield part

    prefill, first = server(prefilled)
    decode, second = server(lambda: StreamingResponse(parts(), media_type="text/event-stream"))
    answer = post(prefill, decode)
    assert (answer.status_code, answer.content) == (200, b"data: a\n\ndata: [DONE]\n\n")
    (asked, headers), (then, later) = first[0], second[0]
    assert asked == {
        "model": "m",
        "prompt": "Hello",
        "max_tokens": 1,
        "stream": False,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    assert then == {**BODY, "kv_transfer_params": PARAMS}
    assert headers["x-request-id"] == later["x-request-id"]
    assert headers["authorization"] == later["authorization"] == "Bearer key"


@pytest.mark.parametrize("which", ["prefilling", "decoding"])
def test_a_server_that_is_gone_is_named(which):
    prefill, _ = server(prefilled)
    answer = post(gone() if which == "prefilling" else prefill, gone())
    assert answer.status_code == 502
    assert answer.json()["error"]["message"] == f"the {which} server did not answer: ConnectError connection refused"


def test_an_answer_that_breaks_off_does_not_end_as_a_whole_one():
    class Breaking(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b"data: a\n\n"
            raise httpx.ReadError("reset")

    prefill, _ = server(prefilled)
    decode = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=Breaking())), base_url="http://server"
    )
    lines = post(prefill, decode).text.split("\n\n")
    assert lines[0] == "data: a" and "[DONE]" not in lines
    assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == 502


def test_what_the_prefilling_server_refuses_is_the_answer():
    refusal = {"error": {"message": "too long"}}
    prefill, _ = server(lambda: JSONResponse(refusal, 400))
    decode, asked = server(prefilled)
    answer = post(prefill, decode)
    assert (answer.status_code, answer.json(), asked) == (400, refusal, [])
