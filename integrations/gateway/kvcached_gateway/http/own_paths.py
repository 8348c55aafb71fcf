"""What the front answers itself: the models, health, whether it takes requests, the metrics."""

from typing import Any

from aiohttp import web

from kvcached_gateway.errors import draining, model_not_found
from kvcached_gateway.http.access import admit
from kvcached_gateway.http.front import Front, KeyView
from kvcached_gateway.settings.loopback import is_loopback

__all__ = ["OwnPaths"]


class OwnPaths:
    """Answers without an engine; each method raises `RefusedError` where there is none."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Answer with every model that the key may ask, in OpenAI's form."""
        key = admit(self._front, request.headers)
        rows = await self._front.status()
        data = [_card(row) for row in rows if _may_see(key, row["id"])]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Answer with one model, named by its id or an alias."""
        key = admit(self._front, request.headers)
        name = request.match_info["id"]
        known = self._front.settings().resolve(name)
        for row in await self._front.status():
            if known is not None and row["id"] == known.id and _may_see(key, known.id):
                return web.json_response(_card(row))
        raise model_not_found(name)

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Answer that the gateway is alive."""
        del request
        return web.Response()

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """Answer whether it takes requests."""
        del request
        if not self._front.is_ready():
            raise draining()
        return web.Response()

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Answer with the metrics: to a key, or to this machine."""
        if request.remote is not None and not is_loopback(request.remote):
            admit(self._front, request.headers)
        text = await self._front.exposition()
        return web.Response(
            body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )


def _may_see(key: KeyView | None, model_id: str) -> bool:
    return key is None or key.models is None or model_id in key.models


def _card(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "model",
        "created": 0,
        "owned_by": "kvcached",
        "kvcached": {name: value for name, value in row.items() if name != "id"},
    }
