"""`InternetSettings`: the destinations that a guest may reach. `qemu/internet/` enforces them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from smolvm_async.config.checks import check_port, shown
from smolvm_async.config.strict import StrictModel
from smolvm_async.errors import ConfigError

Mode = Literal["open", "restricted", "off"]
T = TypeVar("T")

MAX_NAME = 253  # characters of a domain name
LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"(\*\.)?{LABEL}(\.{LABEL})*")
# IDNA 2003, which Python has, and IDNA 2008, which browsers use, encode these differently.
AMBIGUOUS = frozenset("\u00df\u03c2\u200c\u200d")


class InternetSettings(StrictModel):
    """The network policy of a guest. It is enforced outside the guest, for any guest OS.

    Attributes:
        mode: `open`: the internet and the local network, but not this host: its loopback, its own
            addresses, link-local and metadata addresses are shut. `restricted`: only what the other
            fields allow. `off`: nothing. The default is `restricted` if `allowed_domains` or
            `allowed_cidrs` has an entry, else `open`.
        allowed_domains: Names that a `restricted` guest may reach. `"*.debian.org"` allows all
            names below debian.org, but not debian.org itself.
        allowed_cidrs: Networks, or single addresses, that a `restricted` guest may reach by their
            addresses. A name that resolves to a private address needs the address here, too.
            An address of this host needs an entry of its own.
        allowed_host_ports: Ports of this host's loopback (127.0.0.1) that the guest may reach, as
            10.0.2.2:PORT.
    """

    argument = "internet_settings: "
    example = "mode='restricted', allowed_domains=['pypi.org']"

    mode: Mode = "open"
    allowed_domains: Annotated[tuple[str, ...], Field(strict=False)] = ()
    allowed_cidrs: Annotated[tuple[str, ...], Field(strict=False)] = ()
    allowed_host_ports: Annotated[tuple[int, ...], Field(strict=False)] = ()

    def __init__(self, **values: object) -> None:
        domains = _unique(map(_domain, _entries(values, "allowed_domains", "['pypi.org']")))
        cidrs = _unique(map(_cidr, _entries(values, "allowed_cidrs", "['203.0.113.0/24']")))
        listed = _entries(values, "allowed_host_ports", "[8000]")
        ports = tuple(check_port("internet_settings: allowed_host_ports", port) for port in listed)
        mode = values.get("mode", "restricted" if domains or cidrs else "open")
        if mode not in ("open", "restricted", "off"):
            raise ConfigError(
                f"internet_settings: mode={shown(mode)} is wrong: pass 'open', 'restricted' or "
                "'off'."
            )
        allowed = {
            "allowed_domains": domains,
            "allowed_cidrs": cidrs,
            "allowed_host_ports": _unique(ports),
        }
        _check_contradictions(mode, allowed)
        super().__init__(**{**values, **allowed, "mode": mode})


def _check_contradictions(mode: str, allowed: Mapping[str, tuple[object, ...]]) -> None:
    for name, entries in allowed.items():
        if not entries or mode == "restricted" or (mode, name) == ("open", "allowed_host_ports"):
            continue
        reason = "shuts everything" if mode == "off" else "allows all names and networks anyway"
        raise ConfigError(
            f"internet_settings: {name}={shown(list(entries))} contradicts mode={mode!r}, which "
            f"{reason}: pass mode='restricted', or leave {name} out."
        )


def _unique(entries: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(entries))


def _entries(values: Mapping[str, object], name: str, example: str) -> Iterable[object]:
    """Return the entries of a field, which is a list of any kind."""
    listed = values.get(name, ())
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        raise ConfigError(
            f"internet_settings: {name}={shown(listed)} is wrong: pass a list, such as "
            f"{name}={example}."
        )
    return listed


def _domain(value: object) -> str:
    """Return a domain name, or a wildcard, in lower case and in ASCII."""
    wrong = f"internet_settings: allowed_domains has {shown(value)}"
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{wrong}: pass a domain name as str, such as 'pypi.org'.")
    if "/" in value or "@" in value:
        raise ConfigError(f"{wrong}, a URL or a path: pass only the domain name.")
    if re.fullmatch(r"\[?[0-9a-fA-F:]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*\]?", value) or re.fullmatch(
        r"[0-9.]+", value
    ):
        raise ConfigError(f"{wrong}, an address: pass addresses in allowed_cidrs.")
    if ":" in value:
        raise ConfigError(
            f"{wrong}: a name is allowed on all ports: pass {value.partition(':')[0]!r}."
        )
    name = _ascii(value, wrong).lower().removesuffix(".")
    if name == "*":
        raise ConfigError(f"{wrong}, which allows all names: pass mode='open' instead.")
    if "*" in name.removeprefix("*."):
        raise ConfigError(
            f"{wrong}: '*' can only be the whole first label, as in '*.debian.org': list the names."
        )
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise ConfigError(
            f"{wrong}, which is not a domain name: labels are 1 to 63 letters, digits and hyphens, "
            f"with dots between them, and at most {MAX_NAME} characters in all."
        )
    if name in ("localhost", "*.localhost") or name.endswith(".localhost"):
        raise ConfigError(
            f"{wrong}, this host's loopback: pass the port in allowed_host_ports, and connect the "
            "guest to 10.0.2.2."
        )
    return name


def _ascii(name: str, wrong: str) -> str:
    if name.isascii():
        return name
    if AMBIGUOUS & set(name):
        raise ConfigError(f"{wrong}, which has two encodings: pass the encoded name (xn--...).")
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise ConfigError(
            f"{wrong}, which cannot be encoded for DNS ({error}): pass the encoded name (xn--...)."
        ) from None


def _cidr(value: object) -> str:
    """Return a network in its usual notation; a single address is a network, too."""
    from ipaddress import ip_network  # most VMs allow no networks

    wrong = f"internet_settings: allowed_cidrs has {shown(value)}"
    text = str(value)
    if isinstance(value, int | bytes | bool) or "%" in text:
        raise ConfigError(f"{wrong}: pass a network as str, such as '203.0.113.0/24'.")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"{wrong}, which is not a network: pass an address and the length of its prefix, such "
            "as '203.0.113.0/24'; pass names in allowed_domains."
        ) from None
    address = text.partition("/")[0]
    if ip_network(address) != network and network.network_address != ip_network(address)[0]:
        raise ConfigError(
            f"{wrong}, an address inside a network: pass {str(network)!r} for the network, or "
            f"{str(ip_network(address))!r} for the address."
        )
    return str(network)
