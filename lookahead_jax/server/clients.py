"""Who a client is, where it has sent no key."""

import ipaddress
from collections.abc import Sequence
from typing import Any


def client_address(peer: Sequence[Any] | None) -> str:
    """The address of a connection's other end, without its port; of IPv6 the network of 64 bits.

    Such a network belongs to one machine or site, which can use any of its addresses. `peer` is
    None where the address is unknown: these connections are one client.
    """
    if not peer:
        return ""
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])  # without a scope
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:  # of a socket for both
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
