"""The passage of a request: the line, an engine, another if the first died, and what is counted."""

import asyncio
from dataclasses import dataclass, replace

from aiohttp import web

from kvcached_gateway.errors import EngineDiedError, RefusedError, past_deadline
from kvcached_gateway.http.access import Permitted
from kvcached_gateway.http.error_answers import ENGINE_DIED, error_event
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.headers import REQUEST_ID
from kvcached_gateway.http.proxy import EVENT_STREAM, Outcome, Proxy, cut
from kvcached_gateway.lease import Ask, Ending, Lease
from kvcached_gateway.observe import Answer, Where
from kvcached_gateway.state import LOADING

__all__ = ["COMMENT_SECONDS", "ID", "MODEL_ID", "Passage"]

# What a request's mapping holds for its refusal.
ID = web.RequestKey("ID", str)
MODEL_ID = web.RequestKey("MODEL_ID", str)

COMMENT_SECONDS = 10.0  # after so long, and as often, a stream that waits gets a comment
COMMENT = b": the model is starting\n\n"


@dataclass
class Passage:
    """A request on its way.

    Attributes:
        front: What it is answered with.
        proxy: Who asks engines.
        request: As it came.
        body: What was read of it.
        permitted: What it may have.
        arrived: When it came, as the loop's time.
        begun: The stream of events that carries comments, once there is one.
    """

    front: Front
    proxy: Proxy
    request: web.Request
    body: bytes
    permitted: Permitted
    arrived: float
    begun: web.StreamResponse | None = None

    async def serve(self) -> web.StreamResponse:
        """Return the whole answer, sent.

        Raises:
            RefusedError: If there is none, and nothing was sent.
        """
        try:
            return await self._serve()
        except RefusedError as error:
            if self.begun is None:
                raise
            self.front.observe.refused(self.request.get(MODEL_ID), error.code)
            await self.begun.write(error_event(error.code, error.message))
            cut(self.request)
            return self.begun

    async def _serve(self) -> web.StreamResponse:
        ask = self.permitted.ask
        for ask_first in (ask, replace(ask, is_again=True)):
            ask_now = ask_first.later(asyncio.get_running_loop().time() - self.arrived)
            if ask_now.deadline_seconds is not None and ask_now.deadline_seconds <= 0:
                raise past_deadline(ask.model)
            lease = await self._take(ask_now)
            try:
                outcome = await self.proxy.forward(
                    self.request, self.body, lease, self.request[ID], self.begun
                )
            except EngineDiedError:
                lease.end(Ending.DIED_BEFORE)
                continue
            except (asyncio.CancelledError, ConnectionError):
                self.front.observe.cancelled("stream")
                raise
            self._count(outcome, lease)
            return outcome.response
        raise RefusedError(
            502,
            ENGINE_DIED,
            f"the engine of model {ask.model!r} went away twice before it answered",
            retry_after_seconds=5,
        )

    async def _take(self, ask: Ask) -> Lease:
        try:
            model = self.permitted.model
            if ask.is_stream and model is not None and model.loading == "comments":
                return await self._take_with_comments(ask)
            return await self.front.leases.take(ask)
        except (asyncio.CancelledError, ConnectionError):
            self.front.observe.cancelled(await self._where())
            raise

    async def _take_with_comments(self, ask: Ask) -> Lease:
        taking = asyncio.ensure_future(self.front.leases.take(ask))
        try:
            while not (await asyncio.wait({taking}, timeout=COMMENT_SECONDS))[0]:
                if self.begun is None:
                    self.begun = web.StreamResponse(headers={REQUEST_ID: self.request[ID]})
                    self.begun.content_type = EVENT_STREAM
                    await self.begun.prepare(self.request)
                await self.begun.write(COMMENT)
            return taking.result()
        except BaseException:
            taking.cancel()
            if taking.done() and not taking.cancelled() and taking.exception() is None:
                taking.result().end(Ending.CANCELLED)
            raise

    async def _where(self) -> Where:
        """Say whether the client left a line, or a model that was on its way."""
        model_id = self.request.get(MODEL_ID)
        for row in await self.front.status():
            if row["id"] == model_id:
                return "loading" if row.get("state") in LOADING else "line"
        return "line"

    def _count(self, outcome: Outcome, lease: Lease) -> None:
        now = asyncio.get_running_loop().time()
        first = outcome.first_byte_at
        self.front.observe.answered(
            Answer(
                lease.model_id,
                self.permitted.ask.class_name,
                outcome.status,
                waited_seconds=lease.waited_seconds,
                ttft_seconds=None if first is None else first - self.arrived,
                seconds=now - self.arrived,
                woken=lease.woken,
            )
        )
