"""/v1/responses, of which nothing is kept.

Knows:        whether a response is streamed or told whole.
Ignorant of:  fields, shapes.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowmoe.server.asking import Service
from lowmoe.server.caller import caller_of
from lowmoe.server.names import require_served
from lowmoe.server.openai.responses_answer import ResponseInTheMaking
from lowmoe.server.openai.responses_request import ResponsesRequest
from lowmoe.server.sse import STREAMED, collect, respond


def routes(service: Service) -> APIRouter:
    """Making a response, and counting the tokens of one's input."""
    router = APIRouter(prefix="/v1/responses", tags=["openai"])

    @router.post("", responses=STREAMED)
    async def response(request: Request, body: ResponsesRequest) -> Response:
        require_served(body.model, service.model)
        made = ResponseInTheMaking(body, service.model.name)
        events = service.ask(body.ask(caller_of(request)))
        if body.stream:
            return respond(made.frames(events), failed=made.failed)
        return JSONResponse(made.whole(await collect(request, events)))

    @router.post("/input_tokens")
    async def count(request: Request, body: ResponsesRequest) -> dict[str, Any]:
        require_served(body.model, service.model)
        n_tokens = await service.count_tokens(body.ask(caller_of(request)))
        return {"object": "response.input_tokens", "input_tokens": n_tokens}

    return router
