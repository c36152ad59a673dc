"""The arguments of the network policy: their checks, and how they travel with a VM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, ConfigError, InternetSettings, NetworkDenied
from smolvm_async.config.options import make_clone_config, make_config, recheck
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.qemu.events import event_from_json


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ("open", ["internet_settings='open'", "InternetSettings(", "mapping"]),
        ({"domains": []}, ["unknown fields: domains", "allowed_domains"]),
        ({"mode": "closed"}, ["mode='closed'", "'restricted'"]),
        ({"allowed_domains": "pypi.org"}, ["allowed_domains='pypi.org'", "a list"]),
        ({"allowed_domains": {"pypi.org": 1}}, ["allowed_domains=", "a list"]),
        ({"allowed_domains": [7]}, ["has 7", "as str"]),
        ({"allowed_domains": [""]}, ["has ''", "a domain name"]),
        ({"allowed_domains": ["https://pypi.org/simple"]}, ["URL", "only the domain name"]),
        ({"allowed_domains": ["me@pypi.org"]}, ["only the domain name"]),
        ({"allowed_domains": ["pypi.org:443"]}, ["all ports", "pass 'pypi.org'"]),
        ({"allowed_domains": ["203.0.113.1"]}, ["an address", "allowed_cidrs"]),
        ({"allowed_domains": ["2001:db8::1"]}, ["an address", "allowed_cidrs"]),
        ({"allowed_domains": ["*"]}, ["all names", "mode='open'"]),
        ({"allowed_domains": ["a.*.org"]}, ["'a.*.org'", "whole first label"]),
        ({"allowed_domains": ["*x.org"]}, ["'*x.org'", "whole first label"]),
        ({"allowed_domains": ["a..org"]}, ["not a domain name"]),
        ({"allowed_domains": ["-a.org"]}, ["not a domain name"]),
        ({"allowed_domains": ["a\n.org"]}, ["not a domain name"]),
        ({"allowed_domains": ["a." * 127 + "org"]}, ["at most 253 characters"]),
        ({"allowed_domains": ["x" * 64 + ".org"]}, ["1 to 63 letters"]),
        ({"allowed_domains": ["stra\u00dfe.de"]}, ["two encodings", "xn--"]),
        ({"allowed_domains": ["localhost"]}, ["allowed_host_ports", "10.0.2.2"]),
        ({"allowed_cidrs": ["203.0.113.7/24"]}, ["'203.0.113.0/24'", "'203.0.113.7/32'"]),
        ({"allowed_cidrs": ["2001:db8::1/32"]}, ["'2001:db8::/32'", "'2001:db8::1/128'"]),
        ({"allowed_cidrs": ["203.0.113.0/33"]}, ["not a network", "prefix"]),
        ({"allowed_cidrs": ["pypi.org"]}, ["not a network", "allowed_domains"]),
        ({"allowed_cidrs": [7]}, ["has 7", "as str"]),
        ({"allowed_cidrs": ["fe80::1%eth0"]}, ["as str"]),
        ({"allowed_host_ports": [0]}, ["allowed_host_ports=0", "1 to 65535"]),
        ({"allowed_host_ports": ["80"]}, ["allowed_host_ports='80'", "1 to 65535"]),
        ({"allowed_host_ports": 80}, ["allowed_host_ports=80", "[8000]"]),
        ({"mode": "off", "allowed_domains": ["a.org"]}, ["contradicts mode='off'", "restricted"]),
        ({"mode": "off", "allowed_host_ports": [80]}, ["contradicts mode='off'", "leave"]),
        ({"mode": "open", "allowed_domains": ["a.org"]}, ["contradicts mode='open'", "leave"]),
        ({"mode": "open", "allowed_cidrs": ["10.0.0.0/8"]}, ["contradicts mode='open'"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("guest", ["linux", "windows"])
def test_a_wrong_setting_is_named_with_the_fix(
    settings: Any, phrases: list[str], guest: Any, data_dir: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        AsyncSmolVM(os=guest, image="x.qcow2", internet_settings=settings, data_dir=data_dir)
    for phrase in ("internet_settings", *phrases):
        assert phrase in str(caught.value)
    assert not data_dir.exists()


def test_names_and_networks_have_one_spelling() -> None:
    settings = InternetSettings(
        allowed_domains=["PyPI.org.", "pypi.org", "*.Debian.org", "m\u00fcnchen.de", "_dns.x"],
        allowed_cidrs=["203.0.113.0/255.255.255.0", "203.0.113.7", "2001:DB8::/32"],
        allowed_host_ports={8000},
    )
    assert settings.allowed_domains == ("pypi.org", "*.debian.org", "xn--mnchen-3ya.de", "_dns.x")
    assert settings.allowed_cidrs == ("203.0.113.0/24", "203.0.113.7/32", "2001:db8::/32")
    assert settings.allowed_host_ports == (8000,)


def test_a_list_of_names_or_networks_restricts_the_guest() -> None:
    assert InternetSettings().mode == "open"
    assert InternetSettings(allowed_host_ports=[80]).mode == "open"
    assert InternetSettings(allowed_domains=["a.org"]).mode == "restricted"
    assert InternetSettings(allowed_cidrs=["10.0.0.0/8"]).mode == "restricted"
    assert InternetSettings(mode="restricted").allowed_domains == ()


def test_a_clone_has_the_settings_of_its_source_unless_it_has_its_own() -> None:
    source = make_config(internet_settings={"allowed_domains": ["a.org"]})
    assert make_clone_config(source).internet_settings == source.internet_settings
    none = make_clone_config(source, internet_settings=None)
    assert none.internet_settings == source.internet_settings
    own = make_clone_config(source, internet_settings={"mode": "off"})
    assert own.internet_settings == InternetSettings(mode="off")


def test_the_settings_stay_the_same_in_a_record() -> None:
    config = make_config(
        internet_settings={"allowed_domains": ["*.a.org"], "allowed_host_ports": [1, 2]}
    )
    values = json.loads(json.dumps(config.model_dump(mode="json")))
    read = VMConfig(**{**values, "data_dir": config.data_dir})
    assert read == config
    assert recheck(read) == config
    del values["internet_settings"]  # a record of an earlier version
    earlier = VMConfig(**{**values, "data_dir": config.data_dir})
    assert earlier.internet_settings == InternetSettings()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"protocol": "tcp", "address": "127.0.0.1", "port": 22, "reason": "this host"},
            "the network policy denied tcp to 127.0.0.1:22: this host",
        ),
        (
            {"protocol": "udp", "address": "2001:db8::1", "port": 53, "omitted": 7},
            "the network policy denied udp to [2001:db8::1]:53 (and 7 more)",
        ),
        (
            {"protocol": "tcp", "address": "198.18.0.9", "port": 443, "domain": "a.org"},
            "the network policy denied tcp to a.org (198.18.0.9:443)",
        ),
        ({"protocol": "dns", "domain": "b.org"}, "the network policy denied dns to b.org"),
        (
            {"protocol": "icmp", "address": "203.0.113.1"},
            "the network policy denied icmp to 203.0.113.1",
        ),
    ],
    ids=repr,
)
def test_a_denial_tells_its_destination(data: dict[str, Any], text: str) -> None:
    event = event_from_json({"name": NetworkDenied.NAME, "timestamp": 1.0, "data": data})
    assert isinstance(event, NetworkDenied)
    assert str(event) == text
    for name, value in data.items():
        assert getattr(event, name) == value
