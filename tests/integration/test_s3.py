"""Images from S3: a real server on loopback, a proxy as bad as networks are, real guests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    HostError,
    ImageError,
    ImageStore,
    Progress,
    UnsupportedError,
    VMNotRunningError,
    push_image,
)
from smolvm_async.images import qcow2
from smolvm_async.images.build.debian import build_debian
from smolvm_async.images.cache.verifier import Verifier
from smolvm_async.images.s3 import client, download
from smolvm_async.state.status import Status
from tests.conftest import fill_up
from tests.integration.s3_server import (
    Fault,
    Proxy,
    Request,
    plain_client,
    proxy_before,
    s3_server,
    settings,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.anyio

MIB = 1 << 20
SIZE = 24 * MIB  # of the disk that most tests pull: three parts


@pytest.fixture(scope="module")  # those of other modules count this process's children
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("moto")) as url:
        yield url


def disk_of(directory: Path, size: int) -> Path:
    """A qcow2 full of random bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    raw, disk = directory / "raw", directory / "disk.qcow2"
    with raw.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)]
    subprocess.run(command, check=True)
    raw.unlink()
    return disk


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Published:
    """An image that is on the server.

    Attributes:
        uri: Its address.
        disk: The file that it was made from.
    """

    def __init__(self, uri: str, disk: Path) -> None:
        self.uri = uri
        self.disk = disk
        self.digest = digest(disk)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk_of(tmp_path_factory.mktemp("source"), SIZE)


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """The proxy through which the library talks to S3; the cache is the test's own."""
    monkeypatch.setenv("SMOLVM_IMAGE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "BACKOFF", 0.02)  # seconds before the first retry
    with proxy_before(server) as proxy:
        for name, value in settings(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def published_once(server: str, source: Path) -> Published:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(server).items():
            patch.setenv(name, value)
        return Published(asyncio.run(publish(server, source, "source")), source)


@pytest.fixture
def published(published_once: Published, proxy: Proxy) -> Published:
    """An image for all tests that only read it, seen through the proxy of the test."""
    return published_once


async def publish(server: str, disk: Path, prefix: str, **options: Any) -> str:
    await make_bucket(server)
    uri = f"s3://bucket/{prefix}-{os.getpid()}/"
    await push_image(disk.parent, uri, os=options.pop("os", "linux"), **options)
    return uri


async def make_bucket(server: str) -> None:
    async with plain_client(server) as client:
        await client.create_bucket(Bucket="bucket")


async def put(server: str, key: str, content: bytes) -> str:
    await make_bucket(server)
    async with plain_client(server) as client:
        await client.put_object(Bucket="bucket", Key=key, Body=content)
    return f"s3://bucket/{key}"


def files(root: Path) -> list[str]:
    """Return the names of the files in a cache."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def refuse(fault: Fault, *, times: int | None = None, only: str = "GET") -> Callable[..., Any]:
    """Return a fault that strikes the answers with the disk, as often as `times` says."""
    left = [times if times is not None else 1 << 30]

    def decide(request: Request) -> Fault | None:
        if request.method != only or ".json" in request.path or not left[0]:
            return None
        left[0] -= 1
        return fault

    return decide


# Pulling


async def test_an_image_is_downloaded_verified_and_kept_by_its_content(
    published: Published, proxy: Proxy
) -> None:
    steps: list[Progress] = []
    image = await ImageStore().pull(published.uri, on_progress=steps.append)
    assert digest(image.disk) == published.digest == image.disk.name
    assert (image.os, image.size) == ("linux", published.disk.stat().st_size)
    told = [step for step in steps if step.message.startswith("downloading")]
    assert told[-1].done == told[-1].total == image.size
    assert (told[-1].rate or 0) > 0
    assert [step.done for step in told] == sorted(step.done or 0 for step in told)
    assert len({request.span for request in proxy.gets}) == len(proxy.gets) > 1
    left = [name for name in files(ImageStore().root) if not name.startswith(("sha256", "images"))]
    assert left == []


async def test_the_second_time_only_the_manifest_is_asked_for(
    published: Published, proxy: Proxy
) -> None:
    await ImageStore().pull(published.uri)
    proxy.requests.clear()
    await ImageStore().pull(published.uri)
    assert [request.method for request in proxy.requests] == ["GET"]
    assert proxy.gets == []


async def test_the_manifest_itself_can_be_named(published: Published) -> None:
    one = await ImageStore().pull(published.uri)
    other = await ImageStore().pull(f"{published.uri}smolvm-image.json")
    assert one.uri == other.uri
    assert len(await ImageStore().list()) == 1


async def test_a_disk_that_two_uris_have_is_stored_once(
    published: Published, server: str, proxy: Proxy, tmp_path: Path
) -> None:
    other = await publish(server, published.disk, f"{tmp_path.name}-z", compress="zstd")
    one = await ImageStore().pull(published.uri)
    proxy.requests.clear()
    two = await ImageStore().pull(other)
    assert one.disk == two.disk
    assert proxy.gets == []
    assert len(await ImageStore().list()) == 2


async def test_a_compressed_disk_is_decompressed_on_its_way(
    server: str, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    uri = await publish(server, source, tmp_path.name, compress="zstd")
    image = await ImageStore().pull(uri)
    assert digest(image.disk) == digest(source)


async def test_a_manifest_of_the_synchronous_package_is_read(
    server: str, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    kernel, root = b"\x7fELF" + bytes(600), os.urandom(5000)
    prefix = tmp_path.name
    manifest = {
        "name": "alpine",
        "kernel": "vmlinux.bin",
        "kernel_sha256": hashlib.sha256(kernel).hexdigest(),
        "rootfs": "rootfs.ext4",
        "rootfs_sha256": hashlib.sha256(root).hexdigest(),
        "boot_args": "console=ttyS0",
        "sbx": {"agent": "pi"},
    }
    await put(server, f"{prefix}/vmlinux.bin", kernel)
    await put(server, f"{prefix}/rootfs.ext4", root)
    await put(server, f"{prefix}/smolvm-image.json", json.dumps(manifest).encode())
    image = await ImageStore().pull(f"s3://bucket/{prefix}")
    assert image.disk.read_bytes() == root
    assert image.kernel is not None
    assert image.kernel.read_bytes() == kernel


# A bad network


async def test_what_breaks_off_goes_on_where_it_broke_off(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(cut_after=3 * MIB), times=4)
    proxy.sent = 0
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest
    # What had come before a cut is not asked for again, but for what was on its way.
    assert proxy.sent < image.size + 8 * MIB
    starts = [request.span[0] for request in proxy.gets if request.span]
    assert len(starts) >= 4
    assert len(set(starts)) == len(starts)


async def test_a_server_that_is_too_busy_is_asked_again_later(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(status=503), times=5)
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest


async def test_random_cuts_and_refusals_do_no_harm(published: Published, proxy: Proxy) -> None:
    import random

    chance = random.Random(7)

    def fault(request: Request) -> Fault | None:
        kind = chance.random()
        if kind < 0.2:
            return Fault(status=503)
        return Fault(cut_after=chance.randrange(4 * MIB)) if kind < 0.5 else None

    proxy.fault = fault
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest


async def test_a_download_that_always_breaks_off_fails_and_can_be_gone_on_with(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(cut_after=0))
    with pytest.raises(ImageError, match=r"failed .* times in a row"):
        await ImageStore().pull(published.uri)
    assert await ImageStore().list() == []
    proxy.fault = lambda request: None
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest


async def test_a_server_that_falls_silent_is_not_waited_for_without_end(
    published: Published, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_TIMEOUT", 1.5)  # a busy server answers sooner
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    monkeypatch.setattr(download, "SILENCE", 2.5)
    gate = threading.Event()
    proxy.fault = refuse(Fault(hold=gate))
    with pytest.raises(ImageError, match=r"failed 2 times in a row, over . s"):
        await ImageStore().pull(published.uri)
    gate.set()


async def test_a_server_that_never_answers_is_unreachable_and_costs_nothing(
    published: Published, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = refuse(Fault(cut_after=0))
    with pytest.raises(ImageError, match=r"failed .* times in a row"):
        await ImageStore().pull(published.uri)
    before = files(ImageStore().root)
    assert any(name.endswith(".part") for name in before)
    monkeypatch.setattr(client, "READ_TIMEOUT", 0.5)
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    gate = threading.Event()
    proxy.fault = refuse(Fault(hold=gate), only="HEAD")
    with pytest.raises(ImageError, match="cannot be reached"):
        await ImageStore().pull(published.uri)
    assert files(ImageStore().root) == before
    proxy.fault = lambda request: None
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest
    monkeypatch.setattr(client, "READ_TIMEOUT_HURRIED", 0.5)
    proxy.fault = lambda request: Fault(hold=gate)
    assert (await ImageStore().pull(published.uri)).disk == image.disk  # as it was pulled
    gate.set()


async def test_a_manifest_that_breaks_off_is_told_or_taken_from_the_cache(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = lambda request: Fault(cut_after=10)
    with pytest.raises(ImageError, match="was cut off"):
        await ImageStore().pull(published.uri)
    proxy.fault = lambda request: None
    image = await ImageStore().pull(published.uri)
    proxy.fault = lambda request: Fault(cut_after=10)
    assert (await ImageStore().pull(published.uri)).disk == image.disk


async def test_a_manifest_that_stops_coming_is_given_up(
    published: Published, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_TIMEOUT", 0.5)
    # What has been promised does not come.
    proxy.fault = lambda request: Fault(lie=1000, rate=100)
    with pytest.raises(ImageError, match=r"was cut off|cannot be reached"):
        await ImageStore().pull(published.uri)


async def test_what_a_refusal_says_is_not_read_without_end(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = lambda request: Fault(status=403, body=b" " * 256 * MIB)
    value = await asyncio.to_thread(lambda: result(pulling(published.uri, ImageStore().root)))
    assert "denied" in value["error"]
    assert value["peak_kib"] < 150 * 1024


@pytest.mark.parametrize("lie", [-5, 5, 1000])
async def test_a_wrong_length_is_noticed(published: Published, proxy: Proxy, lie: int) -> None:
    proxy.fault = refuse(Fault(lie=lie))
    with pytest.raises(ImageError, match=r"failed .* times in a row"):
        await ImageStore().pull(published.uri)
    assert await ImageStore().list() == []


async def test_another_size_than_the_manifest_says_is_told(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(lie=7), only="HEAD")
    with pytest.raises(ImageError, match="its manifest says"):
        await ImageStore().pull(published.uri)


async def test_a_wrong_byte_names_both_digests_and_leaves_nothing(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(flip=4 * MIB + 5), times=1)
    with pytest.raises(ImageError, match="SHA-256") as caught:
        await ImageStore().pull(published.uri)
    told = set(re.findall("[0-9a-f]{64}", str(caught.value)))
    assert published.digest in told
    assert len(told) == 2
    assert files(ImageStore().root) == []
    proxy.fault = lambda request: None
    assert digest((await ImageStore().pull(published.uri)).disk) == published.digest


async def test_a_server_without_ranges_is_told_from_a_broken_one(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(without_range=True))
    with pytest.raises(ImageError, match="Range"):
        await ImageStore().pull(published.uri)


async def test_an_object_that_changes_in_the_middle_is_noticed(
    source: Path, proxy: Proxy, server: str, tmp_path: Path
) -> None:
    published = Published(await publish(server, source, tmp_path.name), source)
    proxy.requests.clear()
    gate = threading.Event()
    first = [True]

    def fault(request: Request) -> Fault | None:
        if request.method == "GET" and ".json" not in request.path and not gate.is_set():
            if first[0]:
                first[0] = False
            return Fault(hold=gate)
        return None

    proxy.fault = fault
    pulling = asyncio.ensure_future(ImageStore().pull(published.uri))
    while not proxy.gets:
        await asyncio.sleep(0.01)
    key = f"{published.uri.removeprefix('s3://bucket/')}disk.qcow2"
    await put(server, key, os.urandom(published.disk.stat().st_size))
    gate.set()
    with pytest.raises(ImageError, match="was changed"):
        await pulling


async def test_a_slow_server_is_waited_for(published: Published, proxy: Proxy) -> None:
    proxy.fault = refuse(Fault(rate=8 * MIB))
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest


# What S3 refuses


async def test_each_refusal_has_a_sentence_of_its_own(
    server: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, published: Published
) -> None:
    def answer(status: int, code: str) -> Callable[[Request], Fault]:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        return lambda request: Fault(status=status, body=body.encode())

    async def said(uri: str) -> str:
        with pytest.raises(ImageError) as caught:
            await ImageStore().pull(uri)
        return str(caught.value)

    monkeypatch.setattr(client, "ATTEMPTS", 2)  # an answer that stays the same costs a minute
    sentences = [
        await said("s3://nobody-has-this/x/"),
        await said("s3://bucket/nothing/"),
    ]
    for status, code in [
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (400, "ExpiredToken"),
        (301, "PermanentRedirect"),
        (503, "SlowDown"),
    ]:
        proxy.fault = answer(status, code)
        sentences.append(await said(published.uri))
    monkeypatch.setenv("SMOLVM_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    sentences.append(await said(published.uri))
    monkeypatch.setenv("SMOLVM_S3_ENDPOINT_URL", "nonsense")
    sentences.append(await said(published.uri))
    monkeypatch.setenv("SMOLVM_S3_ENDPOINT_URL", proxy.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    sentences.append(await said(published.uri))
    wanted = [
        *("bucket does not exist", "object does not exist", "access is denied"),
        *("not know the access key", "does not match"),
        *("expired", "AWS_REGION", "too busy", "cannot be reached"),
        *("S3 settings cannot be used", "no credentials"),
    ]
    for sentence, words in zip(sentences, wanted, strict=True):
        assert words in sentence
    assert len(set(sentences)) == len(sentences)


# Killed, full, shared


def pulling(uri: str, root: Path, times: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.pulling", uri, str(root), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    values: dict[str, Any] = json.loads(out)
    return values


async def test_a_killed_process_is_gone_on_from(published: Published, proxy: Proxy) -> None:
    root = ImageStore().root
    proxy.fault = refuse(Fault(rate=2 * MIB))
    process = pulling(published.uri, root)
    arrived = 0
    while arrived < 8 * MIB:
        await asyncio.sleep(0.02)
        assert process.poll() is None
        for journal in root.glob("arriving/*.json"):
            ranges = json.loads(journal.read_bytes())["ranges"]
            arrived = sum(end - start for start, end in ranges)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert await ImageStore().list() == []
    proxy.fault = lambda request: None
    proxy.requests.clear()
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest
    asked = sum(request.span[1] + 1 - request.span[0] for request in proxy.gets if request.span)
    assert asked <= image.size - arrived


FORK = """
import asyncio, os, sys
from smolvm_async import ImageStore

async def main(uri, root):
    begun = asyncio.Event()

    def tell(progress):
        if progress.done:
            begun.set()

    pulling = asyncio.create_task(ImageStore(root).pull(uri, on_progress=tell))
    await begun.wait()
    if not (child := os.fork()):
        sys.exit(3)
    image = await pulling
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), image.disk)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_child_that_is_forked_during_a_pull_leaves_it_alone(published: Published) -> None:
    root = ImageStore().root
    command = [sys.executable, "-c", FORK, published.uri, str(root)]
    done = await asyncio.to_thread(
        subprocess.run, command, check=True, capture_output=True, text=True, timeout=300
    )
    status, disk = done.stdout.split()
    assert status == "3", done.stderr
    assert digest(Path(disk)) == published.digest


async def test_what_a_killed_process_left_is_not_trusted(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(cut_after=0))
    with pytest.raises(ImageError):
        await ImageStore().pull(published.uri)
    (journal,) = ImageStore().root.glob("arriving/*.json")
    values = json.loads(journal.read_bytes())
    journal.write_text(json.dumps({**values, "ranges": [[0, 5 * MIB]]}))  # it lies: all is zero
    proxy.fault = lambda request: None
    image = await ImageStore().pull(published.uri)
    assert digest(image.disk) == published.digest


async def test_twenty_tasks_and_three_processes_download_once(
    published: Published, proxy: Proxy
) -> None:
    proxy.fault = refuse(Fault(rate=16 * MIB))
    root = ImageStore().root
    processes = [pulling(published.uri, root, 20) for _ in range(3)]
    results = await asyncio.gather(
        *(asyncio.to_thread(result, process) for process in processes),
        *(ImageStore().pull(published.uri) for _ in range(20)),
    )
    disk = str(root / "sha256" / published.digest)
    assert [values["disks"] for values in results[:3]] == [[disk]] * 3
    assert {str(image.disk) for image in results[3:]} == {disk}
    asked = sum(request.span[1] + 1 - request.span[0] for request in proxy.gets if request.span)
    assert asked == published.disk.stat().st_size


async def test_a_full_disk_is_told_and_nothing_is_left(
    published: Published, small_disk: Path
) -> None:
    store = ImageStore(small_disk / "cache")
    with pytest.raises(HostError, match="does not fit"):
        await store.pull(published.uri)
    assert files(store.root) == []


async def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_left(
    server: str, proxy: Proxy, small_disk: Path, tmp_path: Path
) -> None:
    disk = disk_of(tmp_path / "three", 3 * MIB)
    uri = await publish(server, disk, tmp_path.name)
    gate = threading.Event()
    proxy.requests.clear()
    proxy.fault = refuse(Fault(hold=gate))
    store = ImageStore(small_disk / "cache")
    task = asyncio.ensure_future(store.pull(uri))
    while not proxy.gets:
        await asyncio.sleep(0.01)
    filler = fill_up(small_disk)
    gate.set()
    with pytest.raises(HostError, match="No space left"):
        await task
    filler.unlink()
    assert files(store.root) == []
    assert digest((await store.pull(uri)).disk) == digest(disk)


async def test_a_cancelled_pull_leaves_no_task_and_can_be_gone_on_with(
    published: Published, proxy: Proxy
) -> None:
    before = asyncio.all_tasks()
    proxy.fault = refuse(Fault(rate=4 * MIB))
    tasks = [asyncio.ensure_future(ImageStore().pull(published.uri)) for _ in range(3)]
    while proxy.sent < 4 * MIB:
        await asyncio.sleep(0.01)
    tasks[0].cancel()  # the others still want it
    await asyncio.wait([tasks[0]])
    assert not tasks[1].done()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert asyncio.all_tasks() == before
    proxy.fault = lambda request: None
    assert digest((await ImageStore().pull(published.uri)).disk) == published.digest


async def test_a_pull_can_be_cancelled_at_any_moment(published: Published) -> None:
    before = asyncio.all_tasks()
    moments = 0
    while True:
        task = asyncio.ensure_future(ImageStore().pull(published.uri))
        for _ in range(moments):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert asyncio.all_tasks() == before
        assert not list(ImageStore().root.glob("*/*.lock"))
        if not task.cancelled():
            break
        moments = max(moments + 1, moments * 3 // 2)
    assert moments > 10
    assert digest(task.result().disk) == published.digest


async def test_a_cancelled_pull_does_not_wait_for_what_is_being_decompressed(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = threading.Event()

    def read_to(self: Verifier, end: int) -> None:
        called.set()
        while not self.abandoned:
            time.sleep(0.001)

    monkeypatch.setattr(Verifier, "read_to", read_to)
    task = asyncio.ensure_future(ImageStore().pull(published.uri))
    await asyncio.to_thread(called.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_memory_is_bounded_and_the_loop_goes_on(
    server: str, proxy: Proxy, tmp_path: Path
) -> None:
    uri = await publish(server, disk_of(tmp_path / "large", 128 * MIB), tmp_path.name)
    os.environ["SMOLVM_S3_ENDPOINT_URL"] = server  # the proxy would be the slowest of all
    values = [result(pulling(uri, tmp_path / f"cache{number}")) for number in range(3)]
    assert max(one["peak_kib"] for one in values) < 100 * 1024
    # What the loop's own thread works between two looks at its clock; waiting for a processor, or
    # for the interpreter's lock, is not counted, nor is one collection of garbage.
    assert min(one["longest_work"] for one in values) < 0.010


async def test_clients_that_are_gone_leave_nothing_for_long(server: str) -> None:
    # What a client is made of is cyclic: it goes only if the garbage collector comes round.
    program = """
import asyncio, gc
from smolvm_async.images.s3.client import open_client

async def clients(number):
    for _ in range(number):
        async with open_client():
            pass
    return len(gc.get_objects())

async def main():
    print(await clients(1), await clients(60))

asyncio.run(main())
"""
    environment = os.environ | settings(server)
    command = [sys.executable, "-c", program]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, stdout=subprocess.PIPE, check=True
    )
    one, many = map(int, done.stdout.split())
    assert many - one < 60_000  # 2,500 of each of them, if none was collected


# The cache


async def test_offline_a_cached_image_is_taken(
    published: Published, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = await ImageStore().pull(published.uri)
    monkeypatch.setenv("SMOLVM_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    again = await ImageStore().pull(published.uri)
    assert again.disk == image.disk
    assert "Using the cached image" in caplog.text


async def test_a_file_that_was_written_to_is_downloaded_again(published: Published) -> None:
    image = await ImageStore().pull(published.uri)
    image.disk.chmod(0o600)
    image.disk.write_bytes(image.disk.read_bytes()[:-1] + b"?")
    assert await ImageStore().list() == []
    again = await ImageStore().pull(published.uri)
    assert digest(again.disk) == published.digest


async def test_damage_that_shows_nowhere_is_found_on_demand(published: Published) -> None:
    image = await ImageStore().pull(published.uri)
    assert await ImageStore().verify() == []
    before = image.disk.stat()
    image.disk.chmod(0o600)
    with image.disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"?")
    os.utime(image.disk, ns=(before.st_mtime_ns, before.st_mtime_ns))
    (damage,) = await ImageStore().verify(published.uri)
    assert (damage.path, damage.expected, damage.removed) == (image.disk, published.digest, True)
    assert digest((await ImageStore().pull(published.uri)).disk) == published.digest


async def test_a_file_that_was_touched_is_there_again_and_one_that_is_gone_is_told(
    published: Published,
) -> None:
    image = await ImageStore().pull(published.uri)
    os.utime(image.disk)
    assert await ImageStore().list() == []
    assert await ImageStore().verify() == []
    assert len(await ImageStore().list()) == 1
    image.disk.unlink()
    (damage,) = await ImageStore().verify()
    assert (damage.path, damage.actual) == (image.disk, "")


async def test_what_is_there_already_survives_a_prune_while_two_pull_and_one_is_cancelled(
    server: str, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "image"
    directory.mkdir()
    os.link(source, directory / "disk.qcow2")
    (directory / "vmlinuz").write_bytes(b"\x7fELF" + os.urandom(MIB))
    uri = await publish(server, directory / "disk.qcow2", tmp_path.name)
    root = ImageStore().root
    proxy.fault = lambda request: Fault(rate=8 * MIB) if "disk" in request.path else None
    first = pulling(uri, root)
    while not list(root.glob("arriving/*.part")) or not list(root.glob("sha256/*")):
        await asyncio.sleep(0.01)
    second = asyncio.ensure_future(ImageStore().pull(uri))
    while len(list(root.glob("images/*.pulling"))) < 2:
        await asyncio.sleep(0.01)
    first.send_signal(signal.SIGINT)
    first.communicate()
    await ImageStore().prune()
    image = await second
    assert [one.uri for one in await ImageStore().list()] == [image.uri]
    assert image.kernel is not None
    assert image.kernel.exists()


async def test_a_disk_that_came_as_something_else_is_checked_all_the_same(
    server: str, proxy: Proxy, tmp_path: Path
) -> None:
    content = bytearray(qcow2.empty(MIB))
    content[8:20] = (512).to_bytes(8, "big") + (4).to_bytes(4, "big")  # a backing file
    described = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest = {
        "schema_version": 1,
        "name": "evil",
        "os": "linux",
        "kernel": {"name": "vmlinuz", **described},
        "rootfs": {"name": "disk", "format": "qcow2", **described},
    }
    prefix = f"{tmp_path.name}-{os.getpid()}"
    await put(server, f"{prefix}/vmlinuz", bytes(content))
    await put(server, f"{prefix}/disk", bytes(content))
    await put(server, f"{prefix}/smolvm-image.json", json.dumps(manifest).encode())
    with pytest.raises(ImageError, match="backing file"):
        await ImageStore().pull(f"s3://bucket/{prefix}")


async def test_a_push_that_is_cancelled_at_any_moment_leaves_no_upload(
    server: str, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    await make_bucket(server)
    uri = f"s3://bucket/{tmp_path.name}-{os.getpid()}/"
    proxy.fault = lambda request: Fault(rate=8 * MIB)
    for moment in range(1, 12):
        proxy.requests.clear()
        task = asyncio.ensure_future(push_image(source.parent, uri, os="linux"))
        while len(proxy.requests) < moment and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        async with plain_client(server) as s3:
            uploads = await s3.list_multipart_uploads(Bucket="bucket")
        assert not uploads.get("Uploads")
        if not task.cancelled():
            break


async def test_a_push_to_a_server_that_does_not_read_is_given_up(
    server: str, proxy: Proxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_bucket(server)
    monkeypatch.setattr(client, "READ_TIMEOUT", 1.5)  # a busy server answers sooner
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    gate = threading.Event()
    proxy.fault = lambda request: Fault(hold=gate) if request.method == "PUT" else None
    for size in (source.stat().st_size, MIB):  # parts that no socket holds; a file that one holds
        disk = disk_of(tmp_path / str(size), size)
        with pytest.raises(ImageError, match="cannot be reached"):
            await push_image(disk.parent, f"s3://bucket/{tmp_path.name}-{size}/", os="linux")
    gate.set()


async def test_images_are_removed_by_name_and_what_others_have_stays(
    published: Published, server: str, tmp_path: Path
) -> None:
    other = await publish(server, published.disk, f"{tmp_path.name}-two", name="two")
    one, two = await ImageStore().pull(published.uri), await ImageStore().pull(other)
    assert [gone.uri for gone in await ImageStore().remove("two")] == [two.uri]
    assert one.disk.exists()
    await ImageStore().remove(published.uri)
    assert files(ImageStore().root) == []
    with pytest.raises(ImageError, match="There is no image"):
        await ImageStore().remove("two")


async def test_pruning_removes_what_is_unused_for_longest(
    published: Published, server: str, tmp_path: Path
) -> None:
    disk = disk_of(tmp_path / "small", MIB)
    small = await ImageStore().pull(await publish(server, disk, f"{tmp_path.name}-small"))
    large = await ImageStore().pull(published.uri)
    for record in (ImageStore().root / "images").iterdir():
        if small.uri in record.read_text():
            os.utime(record, (1, 1))
    orphan = ImageStore().root / "sha256" / ("0" * 64)
    orphan.write_bytes(bytes(MIB))  # a file that no image needs goes first
    month = datetime.now() - timedelta(days=30)
    assert [gone.uri for gone in await ImageStore().prune(unused_since=month)] == [small.uri]
    assert await ImageStore().prune(max_bytes=large.size) == []
    assert [gone.uri for gone in await ImageStore().prune(max_bytes=large.size - 1)] == [large.uri]
    assert files(ImageStore().root) == []


async def test_pruning_removes_the_rest_of_a_download(published: Published, proxy: Proxy) -> None:
    proxy.fault = refuse(Fault(cut_after=0))
    with pytest.raises(ImageError):
        await ImageStore().pull(published.uri)
    assert any("arriving" in name for name in files(ImageStore().root))
    await ImageStore().prune()
    assert not any("arriving" in name for name in files(ImageStore().root))


async def test_a_disk_that_is_no_good_qcow2_never_gets_its_name(
    server: str, proxy: Proxy, tmp_path: Path, blank_image: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(blank_image), "-F", "qcow2"]
    subprocess.run([*command, str(overlay)], check=True)
    content = overlay.read_bytes()
    manifest = {
        "schema_version": 1,
        "name": "bad",
        "os": "windows",
        "rootfs": {
            "name": "disk.qcow2",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "format": "qcow2",
        },
    }
    await put(server, f"{tmp_path.name}/disk.qcow2", content)
    uri = await put(server, f"{tmp_path.name}/bad.json", json.dumps(manifest).encode())
    with pytest.raises(ImageError, match="backing file"):
        await ImageStore().pull(uri)
    assert files(ImageStore().root) == []


WEB_PAGE = b"<!doctype html><title>Sign in</title>".ljust(33 * MIB)  # parts of 8 MiB and a rest
INSTALLER = bytes(32769) + b"CD001".ljust(33 * MIB)


@pytest.mark.parametrize(
    ("content", "described", "words"),
    [
        (WEB_PAGE, {"format": "qcow2"}, "not a qcow2 image, but a web page ('Sign in'); "),
        (INSTALLER, {"format": "qcow2"}, "not a qcow2 image, but an ISO image; "),
        (WEB_PAGE, {"format": "raw"}, "not a raw disk, but a web page ('Sign in'); "),
        (WEB_PAGE, {"compression": "zstd"}, "not a zstd file, but a web page ('Sign in'); "),
        (
            zstd.compress(INSTALLER) + zstd.compress(os.urandom(33 * MIB)),
            {"compression": "zstd"},
            "not a qcow2 image, but an ISO image; ",
        ),
    ],
    ids=["page", "iso", "raw-page", "zstd-page", "zstd-iso"],
)
async def test_an_object_that_is_not_a_disk_is_refused_after_its_first_bytes(
    server: str, proxy: Proxy, tmp_path: Path, content: bytes, described: dict[str, Any], words: str
) -> None:
    """All other parts are held: only the first bytes can have told."""
    disk = {"name": "disk", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if "compression" in described:
        described = {**described, "format": "qcow2", "content_sha256": disk["sha256"]}
        described["content_size"] = 70 * MIB
    manifest = {"schema_version": 1, "name": "no", "os": "linux", "rootfs": {**disk, **described}}
    await put(server, f"{tmp_path.name}/disk", content)
    uri = await put(server, f"{tmp_path.name}/no.json", json.dumps(manifest).encode())
    gate = threading.Event()
    first = [None, 0]
    proxy.fault = lambda request: Fault(hold=gate) if (request.span or first)[0] else None
    try:
        with pytest.raises(ImageError, match=re.escape(words)) as caught:
            await ImageStore().pull(uri)
    finally:
        gate.set()
    assert str(caught.value).startswith(f"s3://bucket/{tmp_path.name}/disk ")
    assert files(ImageStore().root) == []


async def test_an_object_replaced_by_something_else_is_named(
    server: str, proxy: Proxy, tmp_path: Path, source: Path
) -> None:
    uri = await publish(server, source, tmp_path.name)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    await put(server, f"{uri.removeprefix('s3://bucket/')}disk.qcow2", pointer)
    with pytest.raises(ImageError, match=r"its manifest says .* \(it is now a Git LFS pointer"):
        await ImageStore().pull(uri)
    await put(server, f"{uri.removeprefix('s3://bucket/')}smolvm-image.json", WEB_PAGE[:500])
    with pytest.raises(ImageError, match=r"not a valid manifest: it is a web page \('Sign in'\)"):
        await ImageStore().pull(uri)


# VMs


@pytest.fixture
async def debian(server: str, proxy: Proxy) -> str:
    built = await build_debian()
    await make_bucket(server)
    uri = "s3://bucket/images/debian-12/"
    await push_image(built.disk.parent, uri, memory=400)
    proxy.requests.clear()
    return uri


async def test_a_linux_guest_boots_from_s3_and_again_offline(
    debian: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Progress] = []
    vm = AsyncSmolVM(
        image=debian, accel="tcg", data_dir=data_dir, keep=True, on_progress=steps.append
    )
    async with vm:
        assert (await vm.run("uname -s", timeout=240)).stdout.strip() == "Linux"
        await vm.run("echo here > /root/kept; sync")
        (info,) = await AsyncSmolVM.list(data_dir=data_dir)
        assert (info.os, info.memory) == ("linux", 400)
        assert info.image.startswith(debian)
        with pytest.raises(ImageError, match=f"in use by {vm.vm_id}"):
            await ImageStore().remove(debian)
        assert await ImageStore().prune(max_bytes=0) == []
    assert any(step.stage == "image" and step.total for step in steps)
    with pytest.raises(ImageError, match=f"in use by {vm.vm_id}"):
        await ImageStore().remove(debian)
    assert await ImageStore().prune(max_bytes=0) == []
    monkeypatch.setenv("SMOLVM_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    again = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
    async with again:
        assert (await again.run("cat /root/kept", timeout=240)).stdout == "here\n"
    await again.delete()
    assert await ImageStore().remove(debian)


async def test_a_raw_disk_of_the_synchronous_package_is_given_to_qemu_as_such(
    server: str, proxy: Proxy, data_dir: Path, tmp_path: Path
) -> None:
    built = await build_debian()
    content = {"kernel": built.kernel.read_bytes(), "rootfs": b"first".ljust(MIB, b"x")}
    manifest = {"name": "raw"}
    for part, data in content.items():
        await put(server, f"{tmp_path.name}/{part}", data)
        manifest |= {part: part, f"{part}_sha256": hashlib.sha256(data).hexdigest()}
    uri = await put(server, f"{tmp_path.name}/raw.json", json.dumps(manifest).encode())
    # With another driver QEMU would not start on these bytes; with the right one it does.
    async with AsyncSmolVM(image=uri, accel="tcg", data_dir=data_dir) as vm:
        head = (data_dir / vm.vm_id / "overlay.qcow2").read_bytes()
        assert qcow2.parse(head[:512], len(head)).virtual_size == MIB
        assert vm.status is Status.RUNNING
        await vm.stop(0)


async def test_a_vm_that_is_not_kept_holds_its_image_while_it_runs(
    published: Published, data_dir: Path
) -> None:
    async with AsyncSmolVM(image=published.uri, accel="tcg", data_dir=data_dir) as vm:
        with pytest.raises(ImageError, match=f"in use by {vm.vm_id}"):
            await ImageStore().remove(published.uri)
        assert await ImageStore().prune(max_bytes=0) == []
        await vm.stop(0)
    assert await ImageStore().remove(published.uri)


async def test_a_windows_image_is_a_windows_guest(
    server: str, proxy: Proxy, stand_in: Path, data_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "windows"
    directory.mkdir()
    (directory / "disk.qcow2").symlink_to(stand_in)
    uri = await publish(server, directory / "disk.qcow2", tmp_path.name, os="windows", memory=2048)
    vm = AsyncSmolVM(image=uri, accel="tcg", data_dir=data_dir)
    async with vm:
        with pytest.raises(UnsupportedError, match=r"terminal.. is not available for Windows"):
            await vm.open_terminal()
        (info,) = await AsyncSmolVM.list(data_dir=data_dir)
        assert (info.os, info.memory) == ("windows", 2048)
        await vm.stop(0)
    refused = AsyncSmolVM(image=uri, accel="tcg", data_dir=data_dir, user="bob")
    with pytest.raises(UnsupportedError, match="user= is not available"):
        await refused.start()
    small = AsyncSmolVM(image=uri, accel="tcg", data_dir=data_dir, memory=512)
    with pytest.raises(ConfigError, match="memory=512 is less than"):
        await small.start()


async def test_the_constructor_asks_nobody(proxy: Proxy, data_dir: Path) -> None:
    vm = AsyncSmolVM(image="s3://bucket/nothing/", data_dir=data_dir)
    assert vm.status is Status.CREATED
    with pytest.raises(VMNotRunningError):
        await vm.run("true")
    with pytest.raises(ImageError, match="object does not exist"):
        await vm.start()
    assert vm.status is Status.CREATED
    assert not data_dir.exists()


async def test_a_start_that_is_stopped_or_cancelled_while_it_reads_leaves_nothing(
    published: Published, proxy: Proxy, data_dir: Path
) -> None:
    for end in ("stop", "delete", "cancel"):
        gate = threading.Event()
        proxy.requests.clear()
        proxy.fault = lambda request, gate=gate: Fault(hold=gate)  # type: ignore[misc]
        vm = AsyncSmolVM(image=published.uri, accel="tcg", data_dir=data_dir)
        start = asyncio.ensure_future(vm.start())
        while not proxy.requests:
            await asyncio.sleep(0.01)
        assert vm.status is Status.STARTING
        if end == "cancel":
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
        else:
            await getattr(vm, end)()
            with pytest.raises(VMNotRunningError):
                await start
        gate.set()
        assert not data_dir.exists()


async def test_a_start_that_is_cancelled_while_it_downloads_leaves_no_vm(
    published: Published, proxy: Proxy, data_dir: Path
) -> None:
    proxy.fault = refuse(Fault(rate=MIB))
    vm = AsyncSmolVM(image=published.uri, accel="tcg", data_dir=data_dir)
    start = asyncio.ensure_future(vm.start())
    while not proxy.gets:
        await asyncio.sleep(0.01)
    start.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert time.monotonic() - began < 20
    assert await AsyncSmolVM.list(data_dir=data_dir) == []
