"""An agent's session without its VMs: pages of output, limits, and how the server starts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from smolvm_async import ConfigError, HostError, SnapshotNotFoundError, VMNotFoundError
from smolvm_async.agents import server
from smolvm_async.agents.output import KEPT, PAGE, Output
from smolvm_async.agents.sandboxes import Sandboxes, SessionLimits
from smolvm_async.cli.app import app


def test_a_short_output_is_shown_as_a_whole() -> None:
    output = Output()
    output.add("a\n")
    output.add("b\n")
    assert output.summary("more") == output.page(0) == "a\nb\n"
    assert output.page(100) == ""


def test_a_long_output_has_its_beginning_and_end_in_the_summary_and_the_rest_in_pages() -> None:
    output = Output()
    lines = [f"{number}\n" for number in range(10_000)]
    for line in lines:
        output.add(line)
    whole, summary = "".join(lines), output.summary("read_output shows them")
    assert len(summary) < PAGE + 200
    assert summary.startswith(whole[: PAGE // 2])
    assert summary.endswith(whole[-PAGE // 2 :])
    assert f"[{len(whole) - PAGE} of {len(whole)} characters are left out: read_output" in summary
    pages, offset = "", 0
    while offset < len(whole):
        page = output.page(offset)
        pages += page[:PAGE] if "pass offset=" in page else page
        offset += PAGE
    assert pages == whole


def test_an_endless_output_takes_little_memory_and_still_has_its_end() -> None:
    output = Output()
    for _ in range(40):
        output.add("x" * (KEPT // 16))
    output.add("the end")
    assert output.summary("").endswith("the end")
    last = output.page(KEPT - 10)
    assert last.startswith("x" * 10)
    assert f"[{output.total - KEPT} more characters were not kept]" in last


def test_what_is_not_of_the_session_or_not_offered_cannot_be_used() -> None:
    async def attempts() -> None:
        async with Sandboxes(SessionLimits(max_memory=1000)) as sandboxes:
            with pytest.raises(VMNotFoundError, match="no sandbox 'office': list_sandboxes shows"):
                sandboxes.find("office")
            with pytest.raises(ConfigError, match=r"os='windows' is not available: .* has linux"):
                await sandboxes.create("windows", None)
            with pytest.raises(HostError, match=r"0 of at most 1000 MiB .* 1 more with 1001 MiB"):
                await sandboxes.create("linux", 1001)
            with pytest.raises(SnapshotNotFoundError):
                await sandboxes.delete_snapshot("office")

    asyncio.run(attempts())
    with pytest.raises(ConfigError, match="max_sandboxes=0 is wrong"):
        SessionLimits(max_sandboxes=0)


def test_a_session_has_no_network_unless_the_user_says_so() -> None:
    assert SessionLimits().options == {"internet_settings": {"mode": "off"}}
    assert SessionLimits().clone_options()["internet_settings"] == {"mode": "off"}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {"mode": "off"}),
        (["--internet", "open"], {"mode": "open"}),
        (["--allow-host-port", "80"], {"mode": "restricted", "allowed_host_ports": [80]}),
        (["--allow-cidr", "1.2.3.4"], {"mode": "restricted", "allowed_cidrs": ["1.2.3.4"]}),
    ],
)
def test_the_server_opens_only_what_its_options_name(
    options: list[str], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    async def note(limits: SessionLimits) -> None:
        served.append(limits)

    monkeypatch.setattr(server, "serve", note)
    assert CliRunner().invoke(app, ["mcp", "--lifetime", "60", *options]).exit_code == 0
    (limits,) = served
    assert limits.options["internet_settings"] == settings
    assert limits.clone_options()["internet_settings"] == settings
    assert limits.lifetime == 60


def test_without_the_sdk_the_server_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mcp"] + ["mcp"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HostError, match=r"pip install 'smolvm-async\[mcp\]'"):
        asyncio.run(server.serve(SessionLimits()))
    result = CliRunner().invoke(app, ["mcp"])
    assert result.exit_code == 3


def test_a_person_who_starts_the_server_by_hand_is_told_how_it_is_meant() -> None:
    pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "smolvm_async", "mcp"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 2
    assert '"args": ["mcp"]' in done.stderr
