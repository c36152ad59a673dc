"""The builder of the stand-in. Other tests boot its disks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolvm_async.errors import CommandError, ConfigError, HostError
from smolvm_async.foundation import process
from smolvm_async.foundation.progress import Progress
from smolvm_async.host.identity import this_host
from smolvm_async.images.build import packages
from stand_in import PROGRAMS, build_stand_in

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("apt-get", "dpkg-deb")),
        reason="the stand-in is built from Debian's or Ubuntu's packages",
    ),
]

BUILD_IN_ANOTHER_PROCESS = """
import asyncio, sys
from pathlib import Path
sys.path.append(sys.argv[2])
from stand_in import build_stand_in
print(asyncio.run(build_stand_in(cache_dir=Path(sys.argv[1]))))
"""


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def packages_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the stand-in was built once, so that its packages are there."""
    cache = tmp_path_factory.mktemp("stand-in")
    asyncio.run(build_stand_in(cache_dir=cache))
    return cache


@pytest.fixture
def cache(packages_cache: Path, tmp_path: Path) -> Path:
    """A cache of the test's own that has the packages and remembers them, and nothing else."""
    return copy_packages(packages_cache, tmp_path / "a cache, 'quoted' @@ \"oddly\"")


def copy_packages(old: Path, new: Path) -> Path:
    shutil.copytree(old / "packages", new / "packages")
    (new / "stand-in").mkdir()
    for memory in (old / "stand-in").glob("packages-*.json"):
        shutil.copy(memory, new / "stand-in")
    return new


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to fetch a package fail."""

    async def refuse(*_: object) -> None:
        raise CommandError("the test is offline")

    monkeypatch.setattr(packages, "update", refuse)
    monkeypatch.setattr(packages, "fetch", refuse)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage(path: Path) -> None:
    """Change its last byte."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def snapshot(cache: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory of the cache with its inode and time of change."""
    status = {str(path): path.lstat() for path in cache.rglob("*")}
    return {path: (one.st_ino, one.st_mtime_ns) for path, one in status.items()}


async def test_a_second_call_runs_nothing_and_touches_nothing(
    packages_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> str:
        raise AssertionError("a program was run")

    first = await build_stand_in(cache_dir=packages_cache)
    before = snapshot(packages_cache)
    monkeypatch.setattr(process, "run", refuse)
    monkeypatch.setenv("PATH", "")

    assert await build_stand_in(cache_dir=packages_cache) == first
    assert snapshot(packages_cache) == before
    assert first.stat().st_mode & 0o777 == 0o444
    assert first.read_bytes()[:4] == b"QFI\xfb"


@pytest.mark.usefixtures("offline", "umask")
async def test_a_rebuild_elsewhere_is_identical_to_the_byte(
    packages_cache: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = await build_stand_in(cache_dir=packages_cache)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")

    rebuilt = await build_stand_in(cache_dir=cache)

    assert rebuilt.name == original.name
    assert digest(rebuilt) == digest(original)


@pytest.mark.usefixtures("offline")
async def test_a_variant_differs_and_shares_the_base(packages_cache: Path) -> None:
    plain = await build_stand_in(cache_dir=packages_cache)
    messages: list[str] = []

    def note(progress: Progress) -> None:
        messages.append(progress.message)

    variant = await build_stand_in(
        cache_dir=packages_cache,
        kernel_arguments=["stand_in.agent=off", "loglevel=7"],
        on_progress=note,
    )

    assert digest(variant) != digest(plain)
    assert "unpacking packages" not in messages
    assert len(list((packages_cache / "stand-in").glob("base-*"))) == 1


async def test_the_desktop_leaves_the_plain_one_alone(cache: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        kept = [*(cache / "stand-in").iterdir(), *(cache / "packages/archives").glob("*.deb")]
        return {path: status for path, status in snapshot(cache).items() if Path(path) in kept}

    plain = await build_stand_in(cache_dir=cache)
    before = files()

    desktop = await build_stand_in(cache_dir=cache, desktop=True)

    assert desktop != plain
    assert await build_stand_in(cache_dir=cache) == plain
    after = files()
    assert before.items() <= after.items()
    new = sorted(Path(path).name.partition("-")[0] for path in after.keys() - before.keys())
    assert new == ["base", "linux", "packages", "stand"]


@pytest.mark.usefixtures("offline")
async def test_builders_at_once_give_one_file(cache: Path) -> None:
    unpackings = 0

    def note(progress: Progress) -> None:
        nonlocal unpackings
        unpackings += progress.message == "unpacking packages"

    said, first, second = await asyncio.gather(
        process.run([sys.executable, "-c", BUILD_IN_ANOTHER_PROCESS, cache, EXAMPLES]),
        build_stand_in(cache_dir=cache, on_progress=note),
        build_stand_in(cache_dir=cache, on_progress=note),
    )

    assert said.strip() == str(first) == str(second)
    assert unpackings <= 1
    names = sorted(path.name.partition("-")[0] for path in (cache / "stand-in").iterdir())
    assert names == ["base", "packages", "stand"]


STEPS = ("unpacking packages", "arranging the guest's files", "making the file systems")


@pytest.mark.usefixtures("offline")
async def test_a_cancelled_build_leaves_nothing_and_a_killed_one_nothing_in_the_way(
    cache: Path,
) -> None:
    before = set(snapshot(cache))
    for step in STEPS:
        reached = asyncio.Event()

        def note(progress: Progress, step: str = step, reached: asyncio.Event = reached) -> None:
            if progress.message == step:
                reached.set()

        build = asyncio.create_task(build_stand_in(cache_dir=cache, on_progress=note))
        await reached.wait()
        await asyncio.sleep(random.random() / 10)  # a moment within the step
        build.cancel()
        build.cancel()
        with pytest.raises(asyncio.CancelledError):
            await build
        assert set(snapshot(cache)) == before, step

    work = cache / "stand-in" / f"building-{this_host().key}"
    left = work / "root" / "bin"  # as of a builder that was killed
    left.mkdir(parents=True)
    (left / "half").touch()
    assert (await build_stand_in(cache_dir=cache)).exists()
    assert not work.exists()


@pytest.mark.usefixtures("offline")
async def test_a_damaged_package_is_never_used(cache: Path) -> None:
    damage(next((cache / "packages/archives").glob("linux-image-*")))

    with pytest.raises(CommandError, match="the test is offline"):
        await build_stand_in(cache_dir=cache)
    assert not list((cache / "stand-in").glob("stand-in-*"))


async def test_a_damaged_package_is_fetched_again(cache: Path) -> None:
    archives = cache / "packages/archives"
    before = snapshot(archives)
    shim = next(archives.glob("shim-signed_*"))
    whole = digest(shim)
    damage(shim)

    names = [path.name.partition("_")[0] for path in archives.glob("*.deb")]
    assert shim in await packages.fetch(names, cache / "packages")

    assert digest(shim) == whole
    changed = {path for path, was in before.items() if snapshot(archives)[path] != was}
    assert changed == {str(shim)}


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("stand_in.coffee=hot", r"'stand_in\.coffee=hot'.*stand_in\.power_button=ignore"),
        ("stand_in.then=explode", r"stand_in\.then=panic"),
        ("quiet\nconfigfile /evil", "printable ASCII"),
        ("it's", "quotes"),
        ("", "printable ASCII"),
    ],
)
async def test_a_wrong_kernel_argument_is_refused_at_once(
    tmp_path: Path, argument: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        await build_stand_in(cache_dir=tmp_path / "cache", kernel_arguments=[argument])
    assert not (tmp_path / "cache").exists()


async def test_missing_programs_are_named_with_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS.keys() - {"mcopy", "qemu-img"}:
        (programs / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(programs))

    with pytest.raises(HostError, match=r"mcopy, qemu-img.*apt-get install mtools qemu-utils"):
        await build_stand_in(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


async def test_a_host_without_apt_is_told_that_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(HostError, match="This host lacks apt-get"):
        await build_stand_in(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


async def test_a_cache_that_cannot_be_written_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")

    with pytest.raises(HostError, match="cannot be built in"):
        await build_stand_in(cache_dir=tmp_path / "cache")
