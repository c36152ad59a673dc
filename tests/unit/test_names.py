"""Allowed names, synthetic addresses, and the rules of the network policy."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from smolvm_async import InternetSettings
from smolvm_async.qemu.internet import lookup, sockets
from smolvm_async.qemu.internet import names as module
from smolvm_async.qemu.internet.addresses import Host
from smolvm_async.qemu.internet.names import SYNTHETIC, Domains, Goal, Names
from smolvm_async.qemu.internet.rules import Rules, Services

REAL = IPv4Address("203.0.113.1")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("pypi.org", True),
        ("files.pypi.org", False),
        ("xpypi.org", False),
        ("debian.org", False),
        ("deb.debian.org", True),
        ("a.b.debian.org", True),
        ("notdebian.org", False),
        ("debian.org.evil.com", False),
        ("evil\\.debian.org", False),
        (".debian.org", False),
        ("*.debian.org", False),
        ("a..debian.org", False),
        ("", False),
    ],
)
def test_a_wildcard_covers_whole_labels(name: str, allowed: bool) -> None:
    assert (name in Domains(["pypi.org", "*.debian.org"])) is allowed


def test_a_name_keeps_its_address_until_many_others_were_asked() -> None:
    names = Names(most=1000)
    first = names.address_of("a.org", [REAL])
    assert first in SYNTHETIC
    assert names.address_of("a.org", [REAL]) == first
    others = [names.address_of(f"{number}.org", [REAL]) for number in range(1000)]
    assert names.name_of(first) is None
    assert names.real_address("a.org") is None
    assert first not in others
    assert [names.name_of(address) for address in others] == [f"{n}.org" for n in range(1000)]
    assert Names().address_of("a.org", []) == first  # a clone's owner


def test_two_names_never_have_the_same_address_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT", 100)
    names = Names(most=100)
    for number in range(300):
        names.add(f"{number}.org")
    latest = [names.address_of(f"{number}.org", []) for number in range(200, 300)]
    assert [names.name_of(address) for address in latest] == [f"{n}.org" for n in range(200, 300)]


@pytest.mark.parametrize(
    ("name", "asked"),
    [("a.org", b"a.org"), ("b.org", b"b.org."), ("c.org", b"c.org."), ("short", b"short")],
)
def test_no_search_list_changes_a_name_with_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: bytes
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("203.0.113.1 x A.org # b.org\n203.0.113.2 c.org.example\n")
    monkeypatch.setattr(lookup, "HOSTS", hosts)

    def getaddrinfo(name: bytes, *_: object, **__: object) -> object:
        assert name == asked
        return [(2, 1, 6, "", ("::ffff:203.0.113.1", 0)), (2, 1, 6, "", ("203.0.113.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert lookup._look_up(name) == (REAL,)


def test_datagrams_of_a_name_keep_their_real_ipv4_address() -> None:
    names, other = Names(), IPv4Address("203.0.113.2")
    names.address_of("a.org", [ip_address("2001:db8::1"), REAL, other])
    assert names.real_address("a.org") == REAL
    names.address_of("a.org", [other, REAL])
    assert names.real_address("a.org") == REAL
    names.address_of("a.org", [other])
    assert names.real_address("a.org") == other
    names.address_of("a.org", [ip_address("2001:db8::1")])
    assert names.real_address("a.org") is None


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("203.0.113.1", ""),
        ("2001:db8::1", ""),
        ("192.168.7.7", ""),
        ("10.0.0.1", "private"),
        ("172.31.0.1", "private"),
        ("192.168.8.1", "private"),
        ("198.18.0.1", "private"),
        ("fd00::1", "private"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("169.254.169.254", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("64:ff9b::cb00:7101", ""),
        ("2002:7f00:1::", "loopback"),
    ],
)
def test_a_name_has_no_address_of_the_host_or_a_private_one(address: str, reason: str) -> None:
    settings = InternetSettings(allowed_domains=["a.org"], allowed_cidrs=["192.168.7.0/24"])
    against = Rules(settings, Host()).reason_against(ip_address(address))
    assert reason in against
    assert bool(reason) is bool(against)


def rules(names: Names, **settings: object) -> Rules:
    services = Services(5353, 8080, lambda goal, port: None, names)
    return Rules(InternetSettings(**settings), Host(), services)


def test_all_dns_goes_to_the_resolver() -> None:
    restricted = rules(Names(), mode="restricted", allowed_cidrs=["8.8.0.0/16"])
    for address in "8.8.8.8", "2001:db8::53", "127.0.0.53", "198.18.0.1":
        for protocol in "tcp", "udp":
            verdict = restricted.decide(protocol, ip_address(address), 53)
            assert (str(verdict.address), verdict.port) == ("127.0.0.1", 5353)
    assert restricted.decide("udp", ip_address("8.8.8.8"), 54).address == ip_address("8.8.8.8")
    assert restricted.decide("udp", ip_address("203.0.113.53"), 54).address is None


def test_a_name_is_reached_as_long_as_it_is_allowed() -> None:
    names = Names()
    address = names.address_of("a.org", [REAL])
    goal = Goal("a.org", address, 443)
    allowed = rules(names, allowed_domains=["*.org"])
    assert allowed.decide("tcp", address, 443)[:2] == (ip_address("127.0.0.1"), 8080)
    assert allowed.decide("udp", address, 443)[:2] == (REAL, 443)
    assert allowed.decide("tcp", address + 1, 443).reason == "not allowed"
    assert allowed.still_allows(goal, REAL)
    assert not allowed.still_allows(goal, ip_address("10.0.0.1"))
    refused = rules(names, allowed_domains=["b.org"])
    for protocol in "tcp", "udp":
        verdict = refused.decide(protocol, address, 443)
        assert (verdict.address, verdict.name) == (None, "a.org")
    assert not refused.still_allows(goal, REAL)
    # In the mode open, the guest may still have the address in its cache.
    assert rules(names).decide("tcp", address, 443).port == 8080
    assert rules(names).still_allows(goal, ip_address("10.0.0.1"))
    assert rules(names, mode="off").decide("tcp", address, 443).address is None
    assert not rules(names, mode="off").still_allows(goal, REAL)


@pytest.mark.parametrize("address", ["64:ff9b::a9fe:a9fe", "2002:7f00:1::"])
def test_an_open_guest_reaches_no_shut_address_by_a_gateway_of_ipv6(address: str) -> None:
    assert Rules(InternetSettings(), Host()).decide("tcp", ip_address(address), 80).reason


def test_a_network_that_is_allowed_does_not_include_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "is_local", lambda address: address == REAL)
    for networks, reached in (["203.0.113.0/24"], False), (["0.0.0.0/0", "203.0.113.1"], True):
        allowing = Rules(InternetSettings(allowed_cidrs=networks), Host())
        assert bool(allowing.decide("tcp", REAL, 80).address) is reached
        assert bool(allowing.reason_against(REAL)) is not reached
        assert allowing.decide("tcp", REAL + 1, 80).address == REAL + 1


def test_a_refusal_names_the_address_that_the_guest_used() -> None:
    shut = Rules(InternetSettings(), Host())
    assert str(shut.decide("tcp", ip_address("127.0.0.1"), 80).asked) == "10.0.2.2"
    assert str(shut.decide("tcp", ip_address("::1"), 80).asked) == "fec0::2"
    assert shut.decide("tcp", ip_address("169.254.0.1"), 80).asked is None
