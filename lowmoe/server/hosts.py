"""By which names this server may be called, and whether others than this machine can call it.

Knows:        addresses, names, what a Host header looks like.
Ignorant of:  requests, who may ask.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.errors import UsageError

_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?", re.ASCII)
_KEY = re.compile(r"[!-~]{1,1024}", re.ASCII)
_EVERYWHERE = (ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))


@dataclass(frozen=True, slots=True)
class Hosts:
    """Names by which clients may call.  bound: the address that is listened on."""

    bound: str
    extra: Sequence[str] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches the bound address."""
        return _is_loopback(self.bound.lower())

    def allow(self, host: str) -> bool:
        """Whether a Host header is one of ours.  Nobody can rebind an address as one can a name, so
        who listens on every address answers to each of them.
        """
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        if _is_loopback(name) or name in {n.strip("[]").lower() for n in (self.bound, *self.extra)}:
            return True
        return _address(self.bound) in _EVERYWHERE and _address(name) is not None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_name(name: str) -> bool:
    found = _HOST.fullmatch(name)
    return _address(name.strip("[]")) is not None or (found is not None and found[2] is None)


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def check_exposure(hosts: Hosts, api_key: str | None) -> None:
    """Refuse a key that no header can carry, a name that no Host is, and to be reached by others
    without a key.

    Raises UsageError.
    """
    for name in hosts.extra:
        if not _is_name(name):
            raise UsageError(
                f"--allow-host is {name!r}, but must be a name or an address alone, without a port "
                "and without wildcards. Give each its own."
            )
    if api_key is not None and not _KEY.fullmatch(api_key):
        raise UsageError(
            f"The API key is {len(api_key)} characters, but it must be 1 to 1024, all of them "
            "printable ASCII and none of them blank. Choose another."
        )
    if api_key is None and not hosts.is_loopback:
        raise UsageError(
            f"{hosts.bound} is reached from other machines, so whoever asks must have a key. "
            "Give one with --api-key, or listen on 127.0.0.1."
        )
