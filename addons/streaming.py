"""Answers that stream from a coroutine: mitmproxy layers that let an addon be the server.

mitmproxy buffers a response that an addon sets, and a streamed one must come from an upstream connection of
mitmproxy's own, whose last bytes it releases before any hook can make a record durable. These two layers add
the missing case through the documented `next_layer` hook, with nothing patched: an addon sets `flow.response`
to a head and `flow.metadata[ANSWER]` to an `Answer`: first bytes that go out with the head, and a function
that is called then and may `send` further ones, each of which goes to the client at once. So mitmproxy never
opens an upstream connection, and `server_connect` can refuse every one.

In the same way an addon may switch protocols: a response 101 with `flow.metadata[UPGRADED]` hands the rest of
the connection to an `Upgraded`, which `send`s what it has to say.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mitmproxy import ctx, flow, http
from mitmproxy.net.http.http1 import expected_http_body_size
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator, NextLayer
from mitmproxy.proxy.layers.http import (
    DropStream,
    HttpErrorHook,
    HttpLayer,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHook,
    HttpStream,
    RequestData,
    RequestEndOfMessage,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    SendHttp,
)

logger = logging.getLogger(__name__)

ANSWER = "polar_answer"
"""`flow.metadata` key: the `Answer` to stream after the head of `flow.response`."""

GONE = "polar_gone"
"""`flow.metadata` key: `Callable[[], None]`, called when the client leaves, also while a hook is awaited."""

UPGRADED = "polar_upgraded"
"""`flow.metadata` key: the `Upgraded` that has the connection after the head of `flow.response`, a 101."""

TOO_LARGE = "polar_too_large"
"""`flow.metadata` key: set when the request body went over the limit; `request` then sees no body."""


@dataclass
class Answer:
    """What follows the head: bytes that leave with it, and a function to call once they have."""

    first: bytes
    begun: Callable[[], None]


class Upgraded(Protocol):
    """Another protocol on a connection that began as HTTP/1.1. Called by mitmproxy's layers: must not wait.

    `closed`: there is nothing left to say, hang up.
    """

    closed: bool

    def received(self, data: bytes) -> bytes:
        """Bytes from the client; returns those to send at once, such as a pong."""
        ...

    def gone(self) -> None:
        """The connection is over. Called once, or more often."""
        ...


@dataclass
class AnswerData(events.MessageInjected):
    """Bytes of a streamed answer; `end` with the last ones."""

    flow: http.HTTPFlow
    message: bytes
    end: bool = False


async def send(flow: http.HTTPFlow, data: bytes, *, end: bool = False) -> bool:
    """Hand bytes to the client's connection and wait until it took them. False: the client is gone."""
    handler = ctx.master.addons.get("proxyserver").connections.get(flow.client_conn.id)
    if handler is None or not flow.live:
        return False
    pending = handler.server_event(AnswerData(flow, data, end))
    if inspect.isawaitable(pending):  # a coroutine since mitmproxy 12
        await pending
    await handler.drain_writers()
    return bool(flow.live or end)


def hang_up(client_id: str) -> None:
    """Close a client's connection."""
    handler = ctx.master.addons.get("proxyserver").connections.get(client_id)
    io = handler and handler.transports.get(handler.client)
    if io and io.handler:
        io.handler.cancel("refused")


class AnswerStream(HttpStream):
    """One request and its answer, which an addon may stream.

    `announce`: run the hooks `responseheaders` and `response`, for addons that want to see answers.
    `identify`: called at once in place of the hook `requestheaders`, which takes a task and a turn of the
    event loop; for where no other addon answers that hook.
    """

    body_limit = 0
    announce = True
    identify: Callable[[http.HTTPFlow], None] | None = None

    def handle_event(self, event: events.Event) -> CommandGenerator[None]:
        # While a hook is awaited, mitmproxy keeps all events for later; this one cannot wait.
        if isinstance(event, RequestProtocolError) and (gone := self.flow.metadata.get(GONE)):
            gone()
        return super().handle_event(event)

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, AnswerData):
            return self.state_answer(event)
        return super()._handle_event(event)

    def state_wait_for_request_headers(self, event: events.Event) -> CommandGenerator[None]:
        stock, reply = super().state_wait_for_request_headers(event), None
        with contextlib.suppress(StopIteration):
            while True:
                command = stock.send(reply)
                if self.identify is None or not isinstance(command, HttpRequestHeadersHook):
                    reply = yield command
                    continue
                reply = None
                try:
                    self.identify(self.flow)
                except Exception:  # as after a hook that fails
                    logger.exception("a request was not identified")

    def state_consume_request_body(self, event: events.Event) -> CommandGenerator[None]:
        if self.announce or not isinstance(event, RequestEndOfMessage):
            yield from super().state_consume_request_body(event)
            return
        self.flow.request.timestamp_end = time.time()
        self.flow.request.data.content = bytes(self.request_body_buf)
        self.request_body_buf.clear()
        self.client_state = self.state_done
        yield HttpRequestHook(self.flow)
        if (yield from self.check_killed(True)):
            return
        if self.flow.response is None:  # no addon of ours leaves a request unanswered
            self.flow.response = http.Response.make(502)
        yield from self.send_response()

    def send_response(self, already_streamed: bool = False) -> CommandGenerator[None]:
        answer: Answer | None = self.flow.metadata.get(ANSWER)
        if UPGRADED in self.flow.metadata:
            yield from self.switch_protocols()
            return
        if answer is None:
            yield from super().send_response(already_streamed)
            return
        yield SendHttp(
            ResponseHeaders(self.stream_id, self.flow.response, end_stream=False), self.context.client
        )
        if answer.first:
            yield SendHttp(ResponseData(self.stream_id, answer.first), self.context.client)
        self.server_state = self.state_answer
        answer.begun()

    def switch_protocols(self) -> CommandGenerator[None]:
        if self.announce:
            yield HttpResponseHook(self.flow)
        self.client_state, self.server_state = self.state_upgraded, self.state_answer
        yield SendHttp(
            ResponseHeaders(self.stream_id, self.flow.response, end_stream=True), self.context.client
        )
        # From here on, HTTP/1's side passes bytes on as they are.
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def state_upgraded(self, event: events.Event) -> CommandGenerator[None]:
        upgraded: Upgraded = self.flow.metadata[UPGRADED]
        if isinstance(event, RequestData) and (out := upgraded.received(event.data)):
            yield SendHttp(ResponseData(self.stream_id, out), self.context.client)
        if upgraded.closed or not isinstance(event, RequestData):
            yield from self.hung_up()

    def hung_up(self) -> CommandGenerator[None]:
        """The end of an upgraded connection, whoever wanted it."""
        self.flow.metadata[UPGRADED].gone()
        self.client_state = self.server_state = self.state_errored
        self.flow.live = False
        yield commands.CloseConnection(self.context.client)
        yield DropStream(self.stream_id)

    def state_answer(self, event: AnswerData) -> CommandGenerator[None]:
        if self.server_state != self.state_answer:
            return  # the client left in the meantime
        if event.message:
            yield SendHttp(ResponseData(self.stream_id, event.message), self.context.client)
        if event.end and UPGRADED in self.flow.metadata:
            yield from self.hung_up()
        elif event.end:
            if self.announce:
                yield HttpResponseHook(self.flow)
            self.server_state = self.state_done
            yield from self.flow_done()

    def handle_protocol_error(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, RequestProtocolError) and self.server_state == self.state_answer:
            # The stock handler would tell the upstream connection, and there is none.
            self.flow.error = flow.Error(event.message)
            self.client_state = self.server_state = self.state_errored
            self.flow.live = False
            yield HttpErrorHook(self.flow)
            yield DropStream(self.stream_id)
            return
        yield from super().handle_protocol_error(event)

    def check_body_size(self, request: bool) -> CommandGenerator[bool]:
        """A request over the limit is answered at once, by the `request` hook; the rest of it is dropped."""
        limit = self.body_limit
        if not request or not limit:
            return False
        size = len(self.request_body_buf) or expected_http_body_size(self.flow.request) or 0
        if size <= limit:
            return False
        if not self.request_body_buf:  # the length was announced; `requestheaders` has not run yet
            yield HttpRequestHeadersHook(self.flow)
        self.request_body_buf.clear()
        self.flow.metadata[TOO_LARGE] = size
        yield HttpRequestHook(self.flow)
        if self.flow.response is None:
            self.flow.response = http.Response.make(413)
        yield from super().send_response()
        self.client_state = self.state_discard
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
        return True

    def state_discard(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, RequestEndOfMessage):
            self.flow.live = False
            yield DropStream(self.stream_id)


class AnswerLayer(HttpLayer):
    """mitmproxy's HTTP layer with `AnswerStream`s."""

    stream_type = AnswerStream

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if not isinstance(event, AnswerData):
            yield from super()._handle_event(event)
            return
        for stream in list(self.streams.values()):
            # A CONNECT tunnel's stream passes the event on to the layer inside.
            if stream.flow is event.flow or stream.child_layer is not None:
                yield from self.event_to_child(stream, event)

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        stream = self.stream_type(self.context.fork(), stream_id)
        self.streams[stream_id] = stream
        yield from self.event_to_child(stream, events.Start())


class Streaming:
    """Addon: puts `AnswerLayer` in place of mitmproxy's `HttpLayer`. Comes after mitmproxy's `NextLayer`."""

    def __init__(self, body_limit: int) -> None:
        self.stream_type = type("LimitedStream", (AnswerStream,), {"body_limit": body_limit})
        self._layer = type("LimitedLayer", (AnswerLayer,), {"stream_type": self.stream_type})

    def next_layer(self, nextlayer: NextLayer) -> None:
        if type(nextlayer.layer) is HttpLayer:
            stock = nextlayer.layer
            nextlayer.context.layers.remove(stock)
            nextlayer.layer = self._layer(nextlayer.context, stock.mode)
