"""The sandbox's resolver, as a pure function: provider names have one address, nothing else exists.

Answers are immediate: a missing resolver costs a harness 10 to 20 s per look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

from mitmproxy import dns
from mitmproxy.net.dns import response_codes, types

PROVIDER_ADDRESS = IPv4Address("198.18.0.1")
"""Where provider names point: a benchmarking address (RFC 2544), local to the sandbox like all others."""

DNSMessage = getattr(dns, "DNSMessage", None) or dns.Message  # renamed in mitmproxy 12


def answer(query: bytes, allowed: Callable[[str], bool], refused: Callable[[str], None]) -> bytes:
    """The answer to a query's bytes; b"" for bytes that are no query.

    `A` of an allowed name gives `PROVIDER_ADDRESS`, other types of it are empty (RFC 2308, NODATA), every
    other name is NXDOMAIN and told to `refused`.
    """
    try:
        message = DNSMessage.unpack(query)
        question = message.question
    except Exception:  # malformed in any of the ways that mitmproxy knows
        return b""
    if question is None or not message.query:
        return b""
    if not allowed(question.name):
        refused(question.name)
        return message.fail(response_codes.NXDOMAIN).packed
    if question.type == types.A:
        return message.succeed([dns.ResourceRecord.A(question.name, PROVIDER_ADDRESS, ttl=60)]).packed
    return message.succeed([]).packed
