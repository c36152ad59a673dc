"""VMs in every kind of event loop: each starts and stops, and leaves nothing.

That no process, descriptor or file is left, `nothing_left` shows after each test, for processes
of other interpreters too; for their descriptors, `life.py` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    DaskFleet,
    Fleet,
    HostError,
    ImageStore,
    VMNotRunningError,
)
from smolvm_async.config.options import VMOptions
from smolvm_async.doctor import examine
from smolvm_async.vm import plan
from tests.conftest import GONE, processes
from tests.integration.life import LOOPS, Run, live, new_vm

ROOT = Path(__file__).parents[2]

Main = Coroutine[None, None, None]


@pytest.fixture(scope="module", autouse=True)
def lasting_descriptors() -> None:
    """Libuv makes a pipe for signals, once for each process, and keeps it."""
    uvloop.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A loop's worker thread ends once the loop is collected."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + GONE
    for thread in set(threading.enumerate()) - before:
        while thread.is_alive():  # it may itself still hold what it did last for the loop
            assert time.monotonic() < deadline, f"{thread.name} was left"
            gc.collect()
            thread.join(0.1)


# In this process


def in_a_runner(main: Main) -> None:
    with asyncio.Runner() as runner:
        runner.run(asyncio.sleep(0))
        runner.run(main)


def in_debug_mode(main: Main) -> None:
    asyncio.run(main, debug=True)


def in_a_thread(main: Main) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, main).result()


def in_uvloop_in_a_thread(main: Main) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(uvloop.run, main).result()


def in_a_thread_of_another_loop(main: Main) -> None:
    asyncio.run(asyncio.to_thread(asyncio.run, main))


def in_a_loop_of_ones_own(main: Main) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main)
    loop.close()


def with_eager_tasks(main: Main) -> None:
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        main.close()
        pytest.skip("Python 3.12 brought them")

    async def eager() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        await main

    asyncio.run(eager())


@pytest.mark.parametrize(
    "run",
    [
        *LOOPS.values(),
        in_a_runner,
        in_debug_mode,
        in_a_thread,
        in_uvloop_in_a_thread,
        in_a_thread_of_another_loop,
        in_a_loop_of_ones_own,
        with_eager_tasks,
    ],
)
def test_a_vm_lives_in_it(blank_image: Path, data_dir: Path, run: Run) -> None:
    run(live(blank_image, data_dir))


def test_two_loops_at_once_do_not_meet(blank_image: Path, tmp_path: Path) -> None:
    both = [live(blank_image, tmp_path / "data" / name) for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(asyncio.run, both))
    for name in ("one", "two"):
        (tmp_path / "data" / name).rmdir()


def test_vms_that_a_threads_loop_forgot_end_with_it(blank_image: Path, data_dir: Path) -> None:
    async def forget() -> None:
        await asyncio.gather(*(new_vm(blank_image, data_dir).start() for _ in range(2)))
        assert len(processes(data_dir)) == 4

    in_a_thread(forget())
    assert not processes(data_dir)
    assert not list(data_dir.iterdir())


@pytest.mark.filterwarnings("ignore::smolvm_async.errors.NetworkWarning")
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "without a guard"])
def test_a_vm_goes_on_after_the_end_of_the_thread_that_started_it(
    blank_image: Path, data_dir: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop goes on in another thread. The parent-death signal is the spawner's."""
    if not guarded:
        monkeypatch.setattr(plan, "find_problem", lambda: HostError("a host without seccomp"))
    loop, vm = asyncio.new_event_loop(), new_vm(blank_image, data_dir)

    def start() -> int:
        loop.run_until_complete(vm.start())
        return threading.get_native_id()

    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(start).result()
    while Path(f"/proc/self/task/{thread}").exists():
        time.sleep(0.001)
    loop.run_until_complete(vm.pause())  # QEMU's answer
    assert str(vm.status) == "paused"
    assert len(processes(data_dir)) == 2
    loop.run_until_complete(vm.delete())
    loop.close()


# In an interpreter of its own


def python(*arguments: str | Path, cwd: Path = ROOT, **variables: str | Path) -> str:
    """Run Python, which must succeed and write nothing to stderr, and return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("flags", [[], ["-X", "dev", "-W", "error"]], ids=["plain", "dev"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_vm_lives_in_a_fresh_interpreter(
    blank_image: Path, data_dir: Path, loop: str, flags: list[str]
) -> None:
    """In the development mode, asyncio tells of what was not awaited, closed or retrieved."""
    python(*flags, "-m", "tests.integration.life", loop, blank_image, data_dir)


OWNER = """
import asyncio, signal, sys, uvloop
from pathlib import Path
from tests.integration.life import LOOPS, new_vm

async def main(image, data_dir):
    async with new_vm(image, data_dir):
        print("running", flush=True)
        await asyncio.Event().wait()

# A test run in the background of a shell has inherited an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
LOOPS[sys.argv[1]](main(*map(Path, sys.argv[2:])))
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_ctrl_c_ends_the_vm_before_the_loop(blank_image: Path, data_dir: Path, loop: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, loop, blank_image, data_dir],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        assert owner.stdout.readline() == "running\n"
        owner.send_signal(signal.SIGINT)
        complaint = owner.stderr.read()
    assert complaint.endswith("\nKeyboardInterrupt\n")
    assert "never retrieved" not in complaint
    assert owner.returncode == -signal.SIGINT
    assert not processes(data_dir)
    assert not list(data_dir.iterdir())


CLOSED = """
import asyncio, sys
from pathlib import Path
from tests.integration.life import new_vm

loop = asyncio.new_event_loop()
loop.run_until_complete(new_vm(*map(Path, sys.argv[1:]), "closed").start())
loop.close()
"""


def test_a_loop_closed_over_a_vm_leaves_nothing_in_the_end(
    blank_image: Path, data_dir: Path
) -> None:
    """The tasks are not cancelled, as by `asyncio.run`: the VM ends with the interpreter."""
    python("-W", "ignore", "-c", CLOSED, blank_image, data_dir)
    assert not list(data_dir.iterdir())


CALLS: dict[str, Callable[[AsyncSmolVM], Awaitable[object]]] = {
    "start": AsyncSmolVM.start,
    "stop": AsyncSmolVM.stop,
    "pause": AsyncSmolVM.pause,
    "delete": AsyncSmolVM.delete,
    "wait_stopped": AsyncSmolVM.wait_stopped,
    "wait_for": lambda vm: vm.wait_for("firmware"),
    "events": lambda vm: anext(vm.events()),
    "follow_console": lambda vm: anext(vm.follow_console()),
    "screenshot": AsyncSmolVM.screenshot,
    "keyboard": lambda vm: vm.keyboard.type("x"),
    "mouse": lambda vm: vm.mouse.click(1, 1),
    "expose_local": lambda vm: vm.expose_local(80),
}


async def refused(call: Callable[[AsyncSmolVM], Awaitable[object]], vm: AsyncSmolVM) -> None:
    with pytest.raises(ConfigError, match=f"{vm.vm_id} belongs to another event loop"):
        await call(vm)


@contextlib.contextmanager
def loop_in_a_thread() -> Iterator[Callable[[Coroutine[None, None, Any]], Any]]:
    """Yield a function that runs a coroutine in the event loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda main: asyncio.run_coroutine_threadsafe(main, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_vm_of_another_threads_loop_refuses_every_call_and_can_be_attached_to(
    blank_image: Path, data_dir: Path
) -> None:
    vm = new_vm(blank_image, data_dir)

    async def attached() -> AsyncSmolVM:
        return await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)

    async def use() -> None:
        async with await attached() as here:
            assert (await here.screenshot()).width

    with loop_in_a_thread() as there:
        there(vm.start())
        client = there(attached())
        for call in CALLS.values():
            asyncio.run(refused(call, vm))
            asyncio.run(refused(call, client))
        asyncio.run(refused(AsyncSmolVM.detach, client))
        asyncio.run(use())
        there(client.detach())
        there(vm.delete())
    assert not list(data_dir.iterdir())


def test_a_vm_whose_loop_has_ended_says_so_and_starts_again_in_the_next(
    blank_image: Path, data_dir: Path
) -> None:
    vm = new_vm(blank_image, data_dir)
    events = vm.events()

    async def ended(call: Callable[[AsyncSmolVM], Awaitable[object]]) -> None:
        with pytest.raises(VMNotRunningError, match="no longer running: its event loop has ended"):
            await call(vm)

    async def live_again() -> None:
        assert (await anext(events)).name == "BOOT_STATE"
        await vm.wait_stopped()
        assert (await vm.stop()).seconds == 0
        await vm.start()
        assert (await vm.wait_for("firmware")).state == "firmware"
        await vm.stop(timeout=0)

    asyncio.run(vm.start())
    assert not processes(data_dir)
    for name in ("pause", "wait_for", "screenshot", "keyboard", "mouse", "expose_local"):
        asyncio.run(ended(CALLS[name]))
    asyncio.run(live_again())
    asyncio.run(vm.wait_stopped())
    asyncio.run(vm.delete())
    asyncio.run(vm.delete())
    assert not list(data_dir.iterdir())


def test_a_fleet_of_another_loop_refuses_every_call(blank_image: Path, data_dir: Path) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> int:
        return item

    async def refuse(call: Callable[[], Awaitable[object]], why: str) -> None:
        with pytest.raises(ConfigError, match=f"this Fleet belongs to another event loop{why}"):
            await call()

    template: VMOptions = {"os": "windows", "image": blank_image, "accel": "tcg"}
    template["data_dir"] = data_dir
    fleet = Fleet(template, size=1, until="firmware")

    async def leave() -> None:
        await fleet.__aexit__(None, None, None)

    with loop_in_a_thread() as there:
        there(fleet.__aenter__())
        for call in (
            fleet.all_ready,
            lambda: anext(aiter(fleet)),
            lambda: anext(fleet.map(job, [1])),
            leave,
        ):
            asyncio.run(refuse(call, ": await it there"))
        there(leave())
    fleet = Fleet(template, size=1, until="firmware")
    asyncio.run(fleet.__aenter__())
    asyncio.run(refuse(fleet.all_ready, ", which was closed: keep one"))
    assert not data_dir.exists() or not list(data_dir.iterdir())


def test_without_asyncio_the_first_call_says_that_asyncio_is_needed(
    blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Under trio no asyncio loop runs, as here."""
    vm, store = new_vm(blank_image, data_dir), ImageStore(tmp_path / "images")
    for call in (
        vm.start,
        vm.stop,
        vm.delete,
        vm.__aenter__,
        lambda: anext(vm.events()),
        lambda: AsyncSmolVM.list(data_dir=data_dir),
        lambda: AsyncSmolVM.prune(data_dir=data_dir),
        Fleet({"os": "windows", "image": blank_image, "accel": "tcg"}).__aenter__,
        DaskFleet("tcp://127.0.0.1:1", {"memory": 512}).__aenter__,
        store.list,
        lambda: store.pull("s3://bucket/image/"),
        store.verify,
        examine,
    ):
        coroutine: Any = call()
        with pytest.raises(ConfigError, match="works with asyncio only, not with trio"):
            coroutine.send(None)


def test_a_vm_that_was_stopped_and_dropped_leaves_nothing(
    blank_image: Path, data_dir: Path
) -> None:
    async def drop() -> None:
        vm = new_vm(blank_image, data_dir)
        await vm.start()
        await vm.stop(timeout=0)

    asyncio.run(drop())
    gc.collect()
    assert not list(data_dir.iterdir())


# In pytest's plugins

ASYNCIO_PLUGIN = """
import pytest, pytest_asyncio

def fixture(scope):
    return pytest_asyncio.fixture(scope=scope, loop_scope="session")

own_fixture = pytest_asyncio.fixture
in_session = pytest.mark.asyncio(loop_scope="session")
alone = pytest.mark.asyncio
"""

ANYIO_PLUGIN = """
import pytest

@pytest.fixture(scope="session", params=[{}, {"use_uvloop": True}], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return "asyncio", request.param

def fixture(scope):
    return pytest.fixture(scope=scope)

own_fixture = pytest.fixture
in_session = alone = pytest.mark.anyio
"""

TESTS = """
import os
from pathlib import Path
from tests.integration.life import new_vm

def a_vm():
    return new_vm(Path(os.environ["IMAGE"]), Path(os.environ["DATA_DIR"]))

@fixture("session")
async def of_session():
    async with a_vm() as vm:
        yield vm

@fixture("module")
async def of_module():
    async with a_vm() as vm:
        yield vm

@fixture("function")
async def of_function():
    async with a_vm() as vm:
        yield vm

@own_fixture
async def of_own_loop():
    async with a_vm() as vm:
        yield vm

@in_session
@pytest.mark.parametrize("turn", range(2))
async def test_all_run(of_function, of_module, of_session, turn):
    for vm in (of_function, of_module, of_session):
        assert vm.status == "running"
        assert (await vm.wait_for("firmware")).state == "firmware"
    await of_function.stop(timeout=0)

@alone
async def test_in_a_loop_of_its_own(of_own_loop):
    assert of_own_loop.status == "running"
"""


@pytest.mark.parametrize(
    ("plugin", "mode", "count"),
    [
        (ASYNCIO_PLUGIN, "asyncio_mode=strict", 3),
        (ASYNCIO_PLUGIN, "asyncio_mode=auto", 3),
        (ANYIO_PLUGIN, "anyio_mode=strict", 6),
    ],
    ids=["pytest-asyncio", "pytest-asyncio-auto", "anyio"],
)
def test_a_vm_lives_in_a_plugins_fixtures(
    blank_image: Path, data_dir: Path, tmp_path: Path, plugin: str, mode: str, count: int
) -> None:
    (tmp_path / "test_vms.py").write_text(plugin + TESTS)
    scope = "asyncio_default_fixture_loop_scope=function"  # or pytest-asyncio warns
    said = python(
        *("-m", "pytest", "-q", "-W", "error", "-o", mode, "-o", scope, "test_vms.py"),
        cwd=tmp_path,
        PYTHONPATH=ROOT,
        IMAGE=blank_image,
        DATA_DIR=data_dir,
    )
    assert f"{count} passed" in said


# In Jupyter


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels find this library and these tests, and keep their files here."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))


NOTEBOOK = """
from pathlib import Path
from tests.conftest import children, descriptors
from tests.integration.life import new_vm
before, data_dir = descriptors(), Path({data_dir!r})
vm = new_vm(Path({image!r}), data_dir)
await vm.start()
# %%
assert vm.status == "running"
(await vm.wait_for("firmware")).state
# %%
async with new_vm(Path({image!r}), data_dir) as other:
    assert len(children()) == 4
# %%
(await vm.stop(timeout=0)).rung
# %%
await vm.delete()
assert not children()
assert not list(data_dir.iterdir())
assert descriptors() == before
"""

EXECUTE = """
import sys
import nbformat.v4, nbclient
cells = [nbformat.v4.new_code_cell(text) for text in sys.argv[1].split("# %%")]
notebook = nbformat.v4.new_notebook(cells=cells)
nbclient.NotebookClient(notebook, kernel_name="python3").execute()
print(*(output["data"]["text/plain"] for cell in notebook.cells for output in cell.outputs))
"""


@pytest.mark.usefixtures("jupyter")
def test_a_vm_lives_in_the_cells_of_a_notebook(blank_image: Path, data_dir: Path) -> None:
    text = NOTEBOOK.format(image=str(blank_image), data_dir=str(data_dir))
    assert run_in_jupyter(EXECUTE, text) == "<BootState.FIRMWARE: 'firmware'> <Rung.QUIT: 'quit'>\n"


KERNEL = """
import sys
from jupyter_client.manager import start_new_kernel

how, image, data_dir = sys.argv[1:]
start = f'''
from pathlib import Path
from tests.integration.life import new_vm
vm = new_vm(Path({image!r}), Path({data_dir!r}), "in-kernel")
await vm.start()
'''
manager, client = start_new_kernel()
assert client.execute_interactive(start)["content"]["status"] == "ok"
if how == "restart":
    manager.restart_kernel()
    client.wait_for_ready()
    assert client.execute_interactive(start)["content"]["status"] == "ok"
client.stop_channels()
manager.shutdown_kernel(now=how == "kill")
"""


@pytest.mark.usefixtures("jupyter")
@pytest.mark.parametrize("how", ["shutdown", "kill", "restart"])
def test_a_kernels_vms_end_with_it(blank_image: Path, data_dir: Path, how: str) -> None:
    """No kernel cancels the tasks of its loop at its end."""
    run_in_jupyter(KERNEL, how, blank_image, data_dir)
    if how == "kill":
        while processes(data_dir):  # the kernel is about to end them
            time.sleep(0.01)
        assert list(data_dir.iterdir())  # until the same id starts again:
        asyncio.run(start_and_delete(new_vm(blank_image, data_dir, "in-kernel")))
    assert not list(data_dir.iterdir())


async def start_and_delete(vm: AsyncSmolVM) -> None:
    async with vm:
        pass


def run_in_jupyter(script: str, *arguments: str | Path) -> str:
    """Run a script that starts a kernel, and return its output; kernels may write to stderr."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
