"""Which hosts addresses of strangers may name, and at which IP addresses they may be."""

import dataclasses
import ipaddress
import queue
import socket
import threading
from typing import Any

from glm4v_jax.errors import ConfigError, MediaError

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Beside what `ipaddress` of every Python knows: protocol assignments, relays of 6to4, examples of documentation, and
# the metadata service of Azure.
_REFUSED = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "168.63.129.16/32"))
)
# Of IPv6, what is routed in the internet; and where networks without IPv4 put its addresses (NAT64).
_ROUTED, _NAT64 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("64:ff9b::/96")


@dataclasses.dataclass(frozen=True)
class AllowedHosts:
    """The hosts that addresses may name, and no others; they must be at public IP addresses.

    >>> hosts = AllowedHosts(("example.com", "*.example.org"))
    >>> [hosts.allows(name) for name in ("example.com", "Example.COM.", "a.example.org", "example.org", "127.0.0.1")]
    [True, True, True, False, False]

    Attributes:
      names: a name is that host alone, `*.NAME` every host below it.
      allow_private: accept loopback and private IP addresses too, for servers of one's own network; never link-local
        ones, where clouds have their metadata.
    """

    names: tuple[str, ...] = ()
    allow_private: bool = False

    def __post_init__(self) -> None:
        """Bring the names into the form in which they are compared.

        Raises:
          ConfigError: one of them is not a name of a host.
        """
        object.__setattr__(self, "names", tuple(_checked_name(name) for name in self.names))

    def allows(self, host: str) -> bool:
        """Whether an address may name a host."""
        host = normalised(host)
        below = [f"*.{host[place + 1 :]}" for place, character in enumerate(host) if character == "."]
        return any(name in self.names for name in (host, *below))

    def addresses(self, host: str, port: int, seconds: float) -> list[str]:
        """Look up the IP addresses of a host; whoever connects to one of them connects to what was checked.

        Raises:
          MediaError: the host is not allowed, or one of its addresses is not.
          OSError: it has none, or none within `seconds`.
        """
        host = normalised(host)
        if not self.allows(host):
            raise MediaError("found a host that is not allowed; expected an allowed one")
        found = list(dict.fromkeys(str(entry[4][0]) for entry in _looked_up(host, port, seconds)))
        if not found or not all(self._is_allowed(ipaddress.ip_address(address)) for address in found):
            raise MediaError("found a host at an address that is not public; expected a public one")
        return found

    def _is_allowed(self, address: _IpAddress) -> bool:
        inner = _embedded(address)
        if inner is not None:
            return self._is_allowed(inner)
        if self.allow_private and (address.is_loopback or (address.is_private and not _is_special(address))):
            return True
        return is_public(address)


def normalised(host: str) -> str:
    """A host as it is compared: in lower case, without brackets and a dot at its end."""
    return host.strip("[]").lower().removesuffix(".")


def is_public(address: _IpAddress) -> bool:
    """Whether an IP address is one of the internet.

    >>> [is_public(ipaddress.ip_address(text)) for text in ("93.184.215.14", "10.0.0.1", "169.254.169.254", "::1")]
    [True, False, False, False]
    """
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    if _is_special(address) or not address.is_global or address.is_private:
        return False
    # Teredo hides an address of IPv4 too, and nobody has a server behind it.
    return isinstance(address, ipaddress.IPv4Address) or (address in _ROUTED and address.teredo is None)


def _is_special(address: _IpAddress) -> bool:
    """Whether an address is no host's: of a group, of the link alone, of nobody."""
    return (
        address.is_multicast
        or address.is_link_local
        or address.is_unspecified
        or (address.is_reserved and not address.is_loopback)
        or any(address in network for network in _REFUSED)
    )


def _embedded(address: _IpAddress) -> ipaddress.IPv4Address | None:
    """The address of IPv4 that one of IPv6 leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _checked_name(name: str) -> str:
    import urllib3

    wildcard, host = ("*.", name[2:]) if name.startswith("*.") else ("", name)
    netloc = f"[{host.strip('[]')}]" if ":" in host else host
    try:
        # As the host of an address: names of any script become ASCII.
        parts = urllib3.util.parse_url(f"http://{netloc}")
    except urllib3.exceptions.HTTPError:
        parts = None
    if parts is None or not parts.host or "*" in host or parts.url != f"http://{parts.host}":
        raise ConfigError(f"found {name!r}; expected a host such as example.com, or *.example.com")
    return wildcard + normalised(parts.host)


def _looked_up(host: str, port: int, seconds: float) -> list[Any]:
    """What the system's resolver says, which has no limit of time itself.

    Raises:
      OSError: nothing, or nothing in time.
    """
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:  # UnicodeError too, of names that cannot be one
            answers.put(error)

    threading.Thread(target=ask, name="glm4v-lookup", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("the name was not resolved in time") from None
    if isinstance(answer, Exception):
        raise OSError("the name is not known") from answer
    return answer
