"""Answers that stream from a coroutine: mitmproxy layers that let an addon be the server.

mitmproxy buffers a response that an addon sets, and a streamed one must come from an upstream connection of
mitmproxy's own, whose last bytes it releases before any hook can make a record durable. These two layers add
the missing case through the documented `next_layer` hook, with nothing patched: an addon sets `flow.response`
to a head and `flow.metadata[ANSWER]` to a function; once the head is out the function is called and may then
`send` chunks, each of which goes to the client at once. So mitmproxy never opens an upstream connection, and
`server_connect` can refuse every one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from mitmproxy import ctx, flow, http
from mitmproxy.net.http.http1 import expected_http_body_size
from mitmproxy.proxy import events
from mitmproxy.proxy.layer import CommandGenerator, NextLayer
from mitmproxy.proxy.layers.http import (
    DropStream,
    HttpErrorHook,
    HttpLayer,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHook,
    HttpStream,
    RequestEndOfMessage,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    SendHttp,
)

ANSWER = "polar_answer"
"""`flow.metadata` key: `Callable[[], None]`, called once the head of `flow.response` is out."""

GONE = "polar_gone"
"""`flow.metadata` key: `Callable[[], None]`, called when the client leaves, also while a hook is awaited."""

TOO_LARGE = "polar_too_large"
"""`flow.metadata` key: set when the request body went over the limit; `request` then sees no body."""


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
    """One request and its answer, which an addon may stream."""

    body_limit = 0

    def handle_event(self, event: events.Event) -> CommandGenerator[None]:
        # While a hook is awaited, mitmproxy keeps all events for later; this one cannot wait.
        if isinstance(event, RequestProtocolError) and (gone := self.flow.metadata.get(GONE)):
            gone()
        return super().handle_event(event)

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, AnswerData):
            return self.state_answer(event)
        return super()._handle_event(event)

    def send_response(self, already_streamed: bool = False) -> CommandGenerator[None]:
        begin: Callable[[], None] | None = self.flow.metadata.get(ANSWER)
        if begin is None:
            yield from super().send_response(already_streamed)
            return
        yield SendHttp(
            ResponseHeaders(self.stream_id, self.flow.response, end_stream=False), self.context.client
        )
        self.server_state = self.state_answer
        begin()

    def state_answer(self, event: AnswerData) -> CommandGenerator[None]:
        if self.server_state != self.state_answer:
            return  # the client left in the meantime
        if event.message:
            yield SendHttp(ResponseData(self.stream_id, event.message), self.context.client)
        if event.end:
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

    body_limit = 0

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if not isinstance(event, AnswerData):
            yield from super()._handle_event(event)
            return
        for stream in list(self.streams.values()):
            # A CONNECT tunnel's stream passes the event on to the layer inside.
            if stream.flow is event.flow or stream.child_layer is not None:
                yield from self.event_to_child(stream, event)

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        stream = AnswerStream(self.context.fork(), stream_id)
        stream.body_limit = self.body_limit
        self.streams[stream_id] = stream
        yield from self.event_to_child(stream, events.Start())


class Streaming:
    """Addon: puts `AnswerLayer` in place of mitmproxy's `HttpLayer`. Comes after mitmproxy's `NextLayer`."""

    def __init__(self, body_limit: int) -> None:
        self._layer = type("AnswerLayer", (AnswerLayer,), {"body_limit": body_limit})

    def next_layer(self, nextlayer: NextLayer) -> None:
        if type(nextlayer.layer) is HttpLayer:
            stock = nextlayer.layer
            nextlayer.context.layers.remove(stock)
            nextlayer.layer = self._layer(nextlayer.context, stock.mode)
