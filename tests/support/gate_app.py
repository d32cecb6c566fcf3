"""A small app behind the gate, on a real market: its routes answer with what reaches them."""

from __future__ import annotations

import json
from types import SimpleNamespace

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests.support.catalogue_documents import NAMESPACE
from vllm_kvmarket.api.gate import Gate, engine_answers
from vllm_kvmarket.api.gate.route_kinds import ROUTES
from vllm_kvmarket.api.service import Service


class Engine:
    """Gives the outputs of a request, with the market's part of each as the test wrote it."""

    def __init__(self):
        self.answers = []

    async def generate(self, *_):
        for left, answer in enumerate(self.answers, 1 - len(self.answers)):
            yield SimpleNamespace(kv_transfer_params={"kvmarket": answer}, finished=left == 0)


def make_app(market, keys, tokenizer=None):
    """An app with every route of the gate's table."""
    app = FastAPI(openapi_url=None)
    app.state.reached = []
    app.state.engine_client = Engine()
    engine_answers.watch(app.state.engine_client)

    async def answer(request: Request):
        body = await request.body()
        app.state.reached.append(request.url.path)
        echo = {"body": json.loads(body) if body else None, "headers": request.headers.items()}
        outputs = app.state.engine_client.generate()
        if echo["body"] and echo["body"].get("stream"):

            async def events():
                async for _ in outputs:
                    pass
                for event in ("data: {}\n\n", "data: [DONE]\n\n"):
                    yield event

            return StreamingResponse(events(), media_type="text/event-stream")
        async for _ in outputs:
            pass
        return echo

    for path, method in ROUTES:
        app.add_api_route(path, answer, methods=[method])
    app.add_api_route("/v9/dream", answer, methods=["POST"])
    renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    app.state.online_renderer = SimpleNamespace(renderer=renderer)
    frontend = SimpleNamespace(namespace=NAMESPACE, context_tokens=4096, is_exact=True)

    async def reuses():
        return frontend.is_exact

    frontend.reuses = reuses
    app.state.kvmarket_service = Service(market=market, keys=keys, info={}, frontend=frontend)
    app.add_middleware(Gate)
    return app
