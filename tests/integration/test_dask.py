"""Fleets on Dask: a real scheduler and real worker processes on loopback, VMs that boot nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    DaskFleet,
    HostError,
    ImageError,
    JobFailedError,
    RemoteError,
    SnapshotNotFoundError,
    WorkerLostError,
)
from smolvm_async.config.options import VMOptions
from smolvm_async.fleet.dask.messages import VERSION
from tests.conftest import processes

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

NEED = 128 + 128  # MiB that a VM takes, with QEMU's overhead
WITHIN = 30.0  # seconds for other processes to act

Template = VMOptions


def gone(pid: int) -> bool:
    """Return whether a process has ended, as a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def until(condition: Any) -> None:
    async with asyncio.timeout(WITHIN):
        while not condition():
            await asyncio.sleep(0.02)


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Have processes end; kill those that do not."""
    for process in processes:
        process.terminate()
    late = []
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late.append(process.args)
    assert not late, "they do not end when they are told to"


class Cluster:
    """A scheduler and its workers, as they are started by hand."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._count = 0
        ports = ("--port", "0", "--dashboard-address", "127.0.0.1:0")
        self.scheduler = self._start("dask_scheduler", *ports, "--no-dashboard")
        self.address = self._find("scheduler-0.log", "Scheduler at:")
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, memory: int | None = 2 * NEED, path: Path | None = None) -> None:
        """Start one more worker, with room for two VMs.

        Args:
            path: Searched for modules before all others.
        """
        resources = ["--resources", f"smolvm_memory={memory}"] if memory is not None else []
        options = ("--nthreads", "4", "--no-dashboard", "--no-nanny", *resources)
        self.workers.append(self._start("dask_worker", self.address, *options, path=path))

    def fill(self, count: int) -> None:
        """Have so many workers that live."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < count:
            self.worker()

    def close(self) -> None:
        """End the workers first: told together with the scheduler, plain Dask's often hang."""
        end(*self.workers)
        end(self.scheduler)

    def _start(
        self, program: str, *arguments: str, path: Path | None = None
    ) -> subprocess.Popen[bytes]:
        self._count += 1
        found = [str(path), *sys.path] if path is not None else sys.path
        name = program.removeprefix("dask_")
        with (self.directory / f"{name}-{self._count - 1}.log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", f"distributed.cli.{program}"),
                    *("--host", "127.0.0.1", *arguments),
                ],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
            )

    def _find(self, log: str, words: str) -> str:
        deadline = time.monotonic() + WITHIN
        while time.monotonic() < deadline:
            for line in (self.directory / log).read_text().splitlines():
                if words in line:
                    return line.split()[-1]
            time.sleep(0.02)
        raise AssertionError((self.directory / log).read_text())


def fleet_on(cluster: Cluster, template: Template, **options: Any) -> DaskFleet:
    return DaskFleet(cluster.address, template, until="firmware", **options)


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    cluster = Cluster(directory)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler that gives up a job when it has killed two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")
        with running_cluster(tmp_path_factory.mktemp("dask")) as cluster:
            yield cluster


@pytest.fixture
def two_workers(shared: Cluster) -> Cluster:
    """The cluster with two workers, whatever the test before did to them."""
    shared.fill(2)
    return shared


@pytest.fixture(autouse=True)
def nothing_left(two_workers: Cluster, nothing_left: None) -> None:
    """As for all tests; the workers are there before."""


async def joined(fleet: DaskFleet, count: int) -> None:
    """Wait for the workers."""
    workers = fleet._workers
    assert workers is not None
    async with asyncio.timeout(WITHIN):
        await workers.client.wait_for_workers(count)
        while workers.count < count or not workers.largest:
            await workers.look()
            await asyncio.sleep(0.02)


# Jobs: they are done in another process, and leave word in files.


async def ident(vm: AsyncSmolVM, item: Any) -> tuple[Any, str, int]:
    assert str(vm.status) == "running"
    return item, vm.vm_id, os.getpid()


class OddError(Exception):
    """One that cannot be made from its pickled form."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


async def fails_at_two(vm: AsyncSmolVM, item: int) -> int:
    if item == 2:
        raise KeyError("two") from OddError(1, 2)
    return item


def begin(vm: AsyncSmolVM, directory: Path) -> None:
    """Write down the VM and its worker."""
    path = directory / f"{vm.vm_id}.partial"
    path.write_text(f"{os.getpid()}")
    path.rename(path.with_suffix(".begun"))


async def lives(vm: AsyncSmolVM, directory: Path) -> None:
    """Stay for as long as one lets it."""
    begin(vm, directory)
    await asyncio.sleep(1000)


def begun(directory: Path) -> dict[str, int]:
    """Return the VMs whose jobs live, with their workers' process ids."""
    return {path.stem: int(path.read_text()) for path in directory.glob("*.begun")}


async def counted(vm: AsyncSmolVM, item: Any) -> int:
    """Return the largest number of VMs that existed while this VM was used."""
    most = 0
    for _ in range(8):
        alive = await AsyncSmolVM.list(data_dir=vm._vm.config.data_dir)
        most = max(most, len(alive))
        await asyncio.sleep(0.01)
    return most


async def drain(results: AsyncIterator[Any]) -> list[Any]:
    return [result async for result in results]


async def test_jobs_are_done_on_all_workers(shared: Cluster, blank: Template) -> None:
    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        results = await drain(fleet.map(ident, range(12)))
    assert sorted(item for item, _, _ in results) == list(range(12))
    assert len({vm_id for _, vm_id, _ in results}) == 12
    assert {pid for _, _, pid in results} == {worker.pid for worker in shared.workers}


async def test_results_come_in_order_and_from_closures(shared: Cluster, blank: Template) -> None:
    factor = 7

    async def job(vm: AsyncSmolVM, item: str) -> str:
        await asyncio.sleep(0.2 if item == "a" else 0)
        return item * factor

    async def items() -> AsyncIterator[str]:
        for letter in "abcdef":
            yield letter

    async with fleet_on(shared, blank, max_live=3) as fleet:
        results = await drain(fleet.map(job, items(), in_order=True))
        assert results == [letter * 7 for letter in "abcdef"]
        assert await drain(fleet.map(ident, [])) == []


async def test_errors_come_back_with_their_causes(shared: Cluster, blank: Template) -> None:
    async with fleet_on(shared, blank) as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            await drain(fleet.map(fails_at_two, [2, 2], retries=1))
    failure = caught.value.exceptions[0]
    assert isinstance(failure, JobFailedError)
    assert (failure.item, failure.attempts) == (2, 2)
    assert failure.vm_id.startswith("vm-")
    cause = failure.__cause__
    assert isinstance(cause, KeyError)
    (note,) = cause.__notes__
    assert "Dask worker tcp://127.0.0.1" in note
    assert "fails_at_two" in note
    assert isinstance(cause.__cause__, RemoteError)
    assert "OddError: 1 and 2" in str(cause.__cause__)


async def test_what_cannot_travel_or_ends_the_process_is_a_failure(
    shared: Cluster, blank: Template
) -> None:
    async def job(vm: AsyncSmolVM, item: Any) -> Any:
        if item == 0:
            return (number for number in range(3))  # cannot be pickled
        if item == 1:
            raise SystemExit(3)
        return "fine"

    def generator() -> Iterator[int]:
        yield 1

    kept = generator()

    async def keeps(vm: AsyncSmolVM, item: Any) -> Any:
        return next(kept)

    items = [0, 1, 2, generator()]
    async with fleet_on(shared, blank, on_error="collect") as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(job, items):
                assert result == "fine"
        with pytest.raises(ConfigError, match="cannot be sent"):
            fleet.map(keeps, [1])
    failures = [error for error in caught.value.exceptions if isinstance(error, JobFailedError)]
    causes = {error.index: error.__cause__ for error in failures}
    assert set(causes) == {0, 1, 3}
    assert "SystemExit(3)" in str(causes[1])


async def test_whatever_a_job_raises_is_its_items_failure(shared: Cluster, blank: Template) -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    class Outcome(BaseException):
        """As those of test frameworks."""

    kinds = [UnspeakableError, Outcome, GeneratorExit, KeyboardInterrupt]

    async def job(vm: AsyncSmolVM, item: int) -> int:
        if 2 <= item < 6:
            raise kinds[item - 2]
        return item

    results: list[int] = []
    async with fleet_on(shared, blank, on_error="collect") as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(job, range(9)):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    failed = {error.index for error in caught.value.exceptions if isinstance(error, JobFailedError)}
    assert sorted(results) == [0, 1, 6, 7, 8]
    assert failed == {2, 3, 4, 5}


class Exits:
    """Ends the process that pickles it."""

    def __reduce__(self) -> Any:
        raise SystemExit(4)


async def test_nothing_of_a_job_ends_its_worker(shared: Cluster, blank: Template) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    async def job(vm: AsyncSmolVM, item: int) -> Any:
        if item == 0:
            task = asyncio.ensure_future(leave())
            await asyncio.wait([task])
            task.exception()
        return Exits() if item == 1 else item

    results: list[int] = []
    for _ in range(2):
        async with fleet_on(shared, blank, on_error="collect") as fleet:
            with pytest.raises(ExceptionGroup) as caught:
                async for result in fleet.map(job, range(5)):
                    results.append(result)  # noqa: PERF401 (those before the failure count)
        (failure,) = caught.value.exceptions
        assert "SystemExit(4)" in str(failure)
    assert sorted(results) == sorted([0, 2, 3, 4] * 2)


async def test_an_image_is_looked_for_on_the_worker(
    shared: Cluster, blank: Template, tmp_path: Path
) -> None:
    async with fleet_on(shared, {**blank, "image": tmp_path / "none.qcow2"}) as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            await drain(fleet.map(ident, range(3)))
    assert isinstance(caught.value.exceptions[0].__cause__, ImageError)


async def test_memory_places_the_vms(shared: Cluster, blank: Template) -> None:
    async with fleet_on(shared, blank) as first, fleet_on(shared, blank) as second:
        await joined(first, 2)
        await joined(second, 2)
        both = [drain(fleet.map(counted, range(8))) for fleet in (first, second)]
        counts = [count for counts in await asyncio.gather(*both) for count in counts]
    assert len(counts) == 16
    assert 2 <= max(counts) <= 4


async def test_a_vm_that_fits_nowhere_is_refused(shared: Cluster, blank: Template) -> None:
    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
    with pytest.raises(HostError, match="any of the 2 Dask workers"):
        await fleet_on(shared, {**blank, "memory": 4096}).__aenter__()


@pytest.mark.parametrize("way", ["cancel", "aclose", "leave"])
async def test_the_vms_end_when_the_caller_stops_iterating(
    shared: Cluster, blank: Template, data_dir: Path, tmp_path: Path, way: str
) -> None:
    fleet = fleet_on(shared, blank)
    async with fleet:
        await joined(fleet, 2)
        results = fleet.map(lives, [tmp_path] * 9)
        draining = asyncio.ensure_future(drain(results))
        await until(lambda: len(begun(tmp_path)) == 4)
        assert len(processes(data_dir)) >= 4
        if way != "leave":
            draining.cancel()
            with pytest.raises(asyncio.CancelledError):
                await draining
            assert not processes(data_dir)
            assert not [*data_dir.iterdir()]
    assert not processes(data_dir)
    assert not [*data_dir.iterdir()]
    assert len(begun(tmp_path)) == 4
    if way == "leave":
        with pytest.raises(ConfigError, match="iterate inside the block"):
            await draining


async def test_a_failure_cancels_the_rest(
    shared: Cluster, blank: Template, data_dir: Path, tmp_path: Path
) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> None:
        if item < 3:
            await lives(vm, tmp_path)
        while len(begun(tmp_path)) < 3:
            await asyncio.sleep(0.01)
        raise ValueError("enough")

    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        with pytest.raises(ExceptionGroup):
            await drain(fleet.map(job, range(9)))
        assert not processes(data_dir)
        assert not [*data_dir.iterdir()]


@pytest.mark.parametrize(
    ("number", "rerun"),
    [(signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGTERM, True)],
)
async def test_a_worker_is_killed(
    shared: Cluster,
    blank: Template,
    data_dir: Path,
    tmp_path: Path,
    number: signal.Signals,
    rerun: bool,
) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> tuple[int, int]:
        """The first four stay, on the worker that is to be killed for ever."""
        if len(begun(tmp_path)) < 4:
            begin(vm, tmp_path)
        while not (tmp_path / "go").exists():
            await asyncio.sleep(0.01)
        return item, os.getpid()

    async with fleet_on(shared, blank, on_error="collect") as fleet:
        await joined(fleet, 2)
        results: list[tuple[int, int]] = []
        failures: list[Any] = []

        async def collect() -> None:
            try:
                async for result in fleet.map(job, range(8), rerun=rerun):
                    results.append(result)  # noqa: PERF401
            except ExceptionGroup as group:
                failures.extend(group.exceptions)

        collecting = asyncio.ensure_future(collect())
        await until(lambda: len(begun(tmp_path)) == 4)
        victim, other = (worker.pid for worker in shared.workers)
        theirs = [vm_id for vm_id, pid in begun(tmp_path).items() if pid == victim]
        assert len(theirs) == 2
        os.kill(victim, number)
        await until(lambda: not any(processes(data_dir / vm_id) for vm_id in theirs))
        (tmp_path / "go").touch()
        async with asyncio.timeout(WITHIN):
            await collecting
    shared.workers[0].wait(WITHIN)  # it takes its time to end in good order
    assert len(results) == (8 if rerun else 6)
    assert {pid for _, pid in results} == {other}
    assert len(failures) == (0 if rerun else 2)
    for failure in failures:
        assert isinstance(failure, JobFailedError)
        assert isinstance(failure.__cause__, WorkerLostError)
        assert "rerun=True" in str(failure)
    assert not [*data_dir.iterdir()]  # pruned


async def test_a_worker_is_killed_while_vms_boot(
    shared: Cluster, blank: Template, data_dir: Path
) -> None:
    """They boot for ever: there is no operating system."""
    async with DaskFleet(shared.address, blank, until="operating_system") as fleet:
        await joined(fleet, 2)
        draining = asyncio.ensure_future(drain(fleet.map(ident, range(8))))
        await until(lambda: len(processes(data_dir)) == 4)
        shared.workers[0].kill()
        await until(lambda: len(processes(data_dir)) == 2)
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        assert not processes(data_dir)
    assert not [*data_dir.iterdir()]


async def test_a_job_that_kills_its_workers_fails(shared: Cluster, blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        with pytest.raises(ExceptionGroup) as caught:
            await drain(fleet.map(job, [1], retries=3))
        shared.worker()
        assert await drain(fleet.map(ident, [2]))
    end(shared.workers[-1])
    (failure,) = caught.value.exceptions
    assert isinstance(failure, JobFailedError)
    assert failure.attempts == 1
    assert isinstance(failure.__cause__, WorkerLostError)
    assert "every Dask worker that ran this job died" in str(failure)


async def test_a_job_whose_vm_dies_is_tried_again(
    shared: Cluster, blank: Template, tmp_path: Path
) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> int:
        tries = tmp_path / "tried"
        if not tries.exists():
            tries.touch()
            for pid in processes(vm._vm.config.data_dir / vm.vm_id):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(1000)
        return item

    async with fleet_on(shared, blank) as fleet:
        assert await drain(fleet.map(job, [5], retries=1)) == [5]


async def test_a_map_that_is_cancelled_at_any_moment_leaves_nothing(
    shared: Cluster, blank: Template, data_dir: Path
) -> None:
    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        for moment in range(8):
            draining = asyncio.ensure_future(drain(fleet.map(ident, range(6))))
            await asyncio.wait([draining], timeout=moment * 0.09)
            draining.cancel()
            await asyncio.wait([draining])
            assert not processes(data_dir)
            assert not data_dir.exists() or not [*data_dir.iterdir()]
        assert len(await drain(fleet.map(ident, range(6)))) == 6
        workers = fleet._workers
        assert workers is not None
        assert (workers.window._busy, len(workers._watched)) == (0, 0)


async def test_a_last_worker_is_killed_and_nobody_waits_for_another(
    shared: Cluster, blank: Template, tmp_path: Path, data_dir: Path
) -> None:
    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        draining = asyncio.ensure_future(drain(fleet.map(lives, [tmp_path] * 4, rerun=False)))
        await until(lambda: len(begun(tmp_path)) == 4)
        for worker in shared.workers:
            worker.kill()
        async with asyncio.timeout(WITHIN):
            with pytest.raises(ExceptionGroup, match="jobs failed") as caught:
                await draining
    assert isinstance(caught.value.exceptions[0].__cause__, WorkerLostError)
    await AsyncSmolVM.prune(data_dir=data_dir)


async def test_jobs_wait_for_workers_which_offer_their_memory(
    tmp_path: Path, blank: Template
) -> None:
    with running_cluster(tmp_path / "dask") as cluster:
        async with fleet_on(cluster, blank) as fleet:
            draining = asyncio.ensure_future(drain(fleet.map(ident, range(3))))
            client = fleet._workers.client  # type: ignore[union-attr]
            async with asyncio.timeout(WITHIN):
                while not await client.scheduler.get_metadata(keys=["nothing"], default=True):
                    pass
                cluster.worker(memory=None)
                assert len(await draining) == 3


async def test_a_client_that_dies_leaves_no_vm(
    shared: Cluster, blank: Template, tmp_path: Path, data_dir: Path
) -> None:
    script = f"""
import asyncio, pathlib
from smolvm_async import DaskFleet
from tests.integration.test_dask import lives
async def main():
    template = dict(os="linux", image={str(blank["image"])!r}, memory=128, accel="tcg",
                    data_dir={str(data_dir)!r})
    async with DaskFleet({shared.address!r}, template, until="firmware") as fleet:
        async for _ in fleet.map(lives, [pathlib.Path({str(tmp_path)!r})] * 6):
            pass
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    client = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        await until(lambda: len(begun(tmp_path)) >= 2)
        assert processes(data_dir)
    finally:
        client.kill()
        client.wait()
    await until(lambda: not processes(data_dir) and not [*data_dir.iterdir()])


async def test_another_version_on_a_worker_is_told_as_one(
    shared: Cluster, blank: Template, tmp_path: Path
) -> None:
    """The worker finds another version of the package's metadata first."""
    metadata = tmp_path / "smolvm_async-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: smolvm-async\nVersion: 0.0.1\n")
    async with fleet_on(shared, blank) as fleet:
        await joined(fleet, 2)
        shared.worker(path=tmp_path)
        await joined(fleet, 3)
        words = rf"client has smolvm-async {VERSION}, .* worker tcp.* 0\.0\.1.* same version"
        with pytest.raises(HostError, match=words):
            await fleet_on(shared, blank).__aenter__()
        with pytest.raises(ExceptionGroup, match="jobs failed") as caught:  # it has joined late
            await drain(fleet.map(ident, range(40)))
        assert isinstance(caught.value.exceptions[0].__cause__, HostError)
    end(shared.workers.pop())


async def test_a_given_client_is_left_alone(shared: Cluster, blank: Template) -> None:
    from distributed import Client

    client = await Client(shared.address, asynchronous=True, set_as_default=False)  # type: ignore[no-untyped-call]
    try:
        async with DaskFleet(client, blank, until="firmware") as fleet:
            assert len(await drain(fleet.map(ident, range(2)))) == 2
        assert client.status == "running"
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"template": {"vm_id": "x"}}, "id of its own"),
        ({"template": {"memroy": 1}}, "memroy"),
        ({"template": {"memory": 1}}, "memory=1"),
        ({"template": {"on_progress": print}}, "on_progress"),
        ({"template": {"port_forwards": [(80, 8080)]}}, "8080"),
        ({"scheduler": 5}, "scheduler=5"),
        ({"max_live": 0}, "max_live=0"),
        ({"until": "launching"}, "until='launching'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DaskFleet(**{"scheduler": "tcp://127.0.0.1:1", **arguments})


async def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"tcp://127\.0\.0\.1:1"):
        from dask import config

        with config.set({"distributed.comm.timeouts.connect": "200ms"}):
            await DaskFleet("tcp://127.0.0.1:1").__aenter__()
    with pytest.raises(ConfigError, match="does not run"):
        DaskFleet("tcp://127.0.0.1:1").map(ident, [])
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(HostError, match=r"pip install 'smolvm-async\[dask\]'"):
        DaskFleet("tcp://127.0.0.1:1")


def test_dask_is_not_imported_until_it_is_used() -> None:
    code = "import sys, smolvm_async; print('distributed' in sys.modules, 'dask' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


async def test_workers_start_vms_from_their_snapshot(
    shared: Cluster, blank: Template, data_dir: Path, tmp_path: Path
) -> None:
    async with AsyncSmolVM(**blank) as vm:
        await vm.snapshot("base")
    clones: Template = {"accel": "tcg", "data_dir": data_dir}
    try:
        async with fleet_on(shared, clones, from_snapshot="base") as fleet:
            await joined(fleet, 2)
            assert fleet._need == NEED
            results = await drain(fleet.map(restored, range(3)))
        assert sorted(results) == [(item, vm.vm_id) for item in range(3)]
        elsewhere = fleet_on(shared, {**clones, "data_dir": tmp_path}, from_snapshot="base")
        with pytest.raises(
            HostError, match=r"none of the Dask workers .* has a snapshot named 'base'"
        ):
            await elsewhere.__aenter__()
        async with fleet_on(shared, clones, from_snapshot="base") as fleet:
            await AsyncSmolVM.delete_snapshot("base", data_dir=data_dir)
            with pytest.raises(ExceptionGroup) as caught:
                await drain(fleet.map(restored, [0]))
        assert isinstance(caught.value.exceptions[0].__cause__, SnapshotNotFoundError)
    finally:
        with suppress(SnapshotNotFoundError):
            await AsyncSmolVM.delete_snapshot("base", data_dir=data_dir)


async def restored(vm: AsyncSmolVM, item: int) -> tuple[int, str]:
    """Return the id of the VM that this VM is a clone of."""
    run = vm._run
    assert run is not None
    return item, run.boot.last.evidence.split()[-1]
