"""URIs of images, as rows name them: which of them may be asked for, and where.

What a dataset says is not trusted. A URI in it must lie under a prefix that the user gave; none is allowed by
default, and `file://` never.

    s3://bucket/prefix    a key is what stands after the bucket, letter for letter
    https://host/prefix   or http://; whole segments of the path, without dots that lead elsewhere
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from mmray.errors import ConfigError, DataError
from mmray.schema import Status

PORTS = {"https": 443, "http": 80}
METADATA_ADDRESSES = ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")
"""Where clouds tell a machine its secrets, beside the link-local addresses."""


IPV4_IN_IPV6 = tuple(map(ipaddress.ip_network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96")))
"""IPv6 networks whose last four bytes are an IPv4 address."""


class UnfetchedError(DataError):
    """An image that cannot be had, neither now nor later, and what that makes of its row."""

    def __init__(self, reason: str, status: Status = Status.BAD_IMAGE) -> None:
        """Take the reason, and `NO_IMAGE` or `BAD_IMAGE`."""
        super().__init__(reason)
        self.status = status


class Uri(NamedTuple):
    """A URI in the parts that it is asked for by."""

    scheme: str
    host: str
    """Or the bucket."""
    port: int
    path: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Take a URI apart.

        Raises:
            UnfetchedError: it is none that may be fetched; the reason goes on after "image URI ...".
        """
        scheme, _, rest = text.partition("://")
        if scheme.lower() == "s3":
            bucket, slash, key = rest.partition("/")
            return cls("s3", bucket, 0, slash + key)
        # Quoted first, so that nothing in it means one thing to this check and another to the server.
        try:
            parts = urlsplit(quote(text, safe="!#$%&'()*+,/:;=?@[]~"))
            port = parts.port
        except ValueError as error:
            raise UnfetchedError(f"is no URI ({error})") from None
        if parts.scheme not in PORTS:
            raise UnfetchedError(f"is of no scheme that is fetched (s3, {', '.join(PORTS)})")
        if "@" in parts.netloc:
            raise UnfetchedError("holds a user or a password")
        if any(segment in (".", "..") for segment in unquote(parts.path).split("/")):
            raise UnfetchedError("has dots in its path that lead elsewhere")
        return cls(parts.scheme, parts.hostname or "", port or PORTS[parts.scheme], parts.path, parts.query)

    @property
    def netloc(self) -> str:
        """Host and port as a request names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS.get(self.scheme, 0) else f"{host}:{self.port}"

    def __str__(self) -> str:
        """Show it in a message: without its query, which may hold a signature."""
        return f"{self.scheme}://{self.netloc}{self.path}".partition("?")[0][:200]


@dataclass(frozen=True)
class Prefixes:
    """Places below which images may be fetched."""

    places: tuple[Uri, ...]

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> Prefixes:
        """Read `scheme://host/path` of each.

        Raises:
            ConfigError: one is no place that can be fetched from.
        """
        places = []
        for text in texts:
            if any(character in text for character in "?#@"):  # what may be a secret is not repeated
                raise ConfigError("an --image-prefix with ?, # or @ in it; give scheme://host/path alone")
            try:
                places.append(Uri.parse(text))
            except DataError as error:
                raise ConfigError(f"--image-prefix {text!r} {error}") from None
            if not places[-1].host:
                raise ConfigError(f"--image-prefix {text!r} names no host or bucket")
        return cls(tuple(places))

    def allowed(self, text: str) -> Uri:
        """Take a URI apart that lies under one of the prefixes.

        Raises:
            UnfetchedError: it does not; the reason goes on after "image URI ...".
        """
        uri = Uri.parse(text)
        for place in self.places:
            below = f"{uri.path}/".startswith(place.path.rstrip("/") + "/")
            if below and uri[:3] == place[:3]:
                return uri
        raise UnfetchedError("is under no --image-prefix")


def find_address(uri: Uri) -> str:
    """Find the address of a host.

    Raises:
        UnfetchedError: there is no such host, or it is at an address that must not be asked.
        ConnectionError: the name server does not answer.
    """
    try:
        found = socket.getaddrinfo(uri.host, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise UnfetchedError("names a host that cannot be", Status.NO_IMAGE) from None
    except socket.gaierror as error:
        if error.errno not in (socket.EAI_NONAME, socket.EAI_NODATA):
            raise ConnectionError("the name server does not answer") from None
        raise UnfetchedError("names a host that does not exist", Status.NO_IMAGE) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if is_forbidden(address):
            raise UnfetchedError(f"names a host at {address}, an address that is not asked")
    return addresses[0]


def is_forbidden(text: str) -> bool:
    """Tell whether only tricks lead to an address: link-local, metadata, multicast, none at all."""
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = address
    if isinstance(address, ipaddress.IPv6Address):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        translated = any(address in network for network in IPV4_IN_IPV6)
        inner = embedded if translated else address.sixtofour or address
    special = inner.is_link_local or inner.is_multicast or inner.is_unspecified
    return special or str(inner) in METADATA_ADDRESSES
