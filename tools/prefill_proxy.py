"""A small proxy for prefill and decode apart: one server computes prompts, another one reads their pages and goes on.

For trying it, and as an example of what a proxy does. It knows one server of each kind; see docs/guides/connectors.md.
"""

import argparse
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/v1/completions", "/v1/chat/completions")
PREFILL_ONLY = {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1, "stream": False}
"""What the prefilling server is asked of a request: its pages. Its token is not used, since the other one makes it."""


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """The request for the prefilling server, of a client's."""
    wanted = {key: value for key, value in PREFILL_ONLY.items() if key in body or key in ("max_tokens", "stream")}
    rest = {key: value for key, value in body.items() if key != "stream_options"}
    return {**rest, **wanted, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}


def make_app(prefill: httpx.AsyncClient, decode: httpx.AsyncClient) -> Starlette:
    """The proxy, between two servers."""

    async def serve(request: Request) -> Response:
        body = await request.json()
        headers = {"X-Request-Id": str(uuid.uuid4())}
        if "authorization" in request.headers:
            headers["Authorization"] = request.headers["authorization"]
        path = request.url.path
        try:
            first = await prefill.post(path, json=prefill_body(body), headers=headers)
        except httpx.HTTPError as error:
            return _gone("prefilling", error)
        if first.status_code != httpx.codes.OK:
            return Response(first.content, first.status_code, media_type=first.headers.get("content-type"))
        asked = {**body, "kv_transfer_params": first.json().get("kv_transfer_params")}
        try:
            answer = await decode.send(decode.build_request("POST", path, json=asked, headers=headers), stream=True)
        except httpx.HTTPError as error:
            return _gone("decoding", error)
        return StreamingResponse(
            _passed_on(answer), answer.status_code, media_type=answer.headers.get("content-type", "application/json")
        )

    async def health(request: Request) -> Response:
        try:
            found = [(await server.get("/health")).status_code for server in (prefill, decode)]
        except httpx.HTTPError as error:
            return _gone("prefilling or the decoding", error)
        return Response(status_code=max(found))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with prefill, decode:
            yield

    routes = [Route(path, serve, methods=["POST"]) for path in PATHS] + [Route("/health", health)]
    return Starlette(routes=routes, lifespan=lifespan)


async def _passed_on(answer: httpx.Response) -> AsyncIterator[bytes]:
    """A server's answer as it comes. Where it ends too early, the stream says so, and does not end as a whole one."""
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        yield b"data: " + json.dumps(_problem("decoding", error)).encode() + b"\n\n"
    finally:
        await answer.aclose()


def _gone(which: str, error: Exception) -> Response:
    return JSONResponse(_problem(which, error), httpx.codes.BAD_GATEWAY)


def _problem(which: str, error: Exception) -> dict[str, Any]:
    message = f"the {which} server did not answer: {type(error).__name__} {error}".strip()
    return {"error": {"message": message, "type": "BadGatewayError", "code": int(httpx.codes.BAD_GATEWAY)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", required=True, metavar="URL", help="such as http://127.0.0.1:8100")
    parser.add_argument("--decode", required=True, metavar="URL", help="such as http://127.0.0.1:8200")
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    args = parser.parse_args()
    servers = (httpx.AsyncClient(base_url=url, timeout=None) for url in (args.prefill, args.decode))
    uvicorn.run(make_app(*servers), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
