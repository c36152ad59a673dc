"""The public class: the order of things."""

from __future__ import annotations

import os as os_module
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

from smolvm_async.config.checks import check_timeout, check_vm_id
from smolvm_async.config.vm_config import (
    Limits,
    Timeouts,
    VMConfig,
    is_published,
    make_config,
    make_data_dir,
)
from smolvm_async.controls.desktop.desktop import Desktop
from smolvm_async.controls.interface import VM, running
from smolvm_async.controls.ports import PortForwarding
from smolvm_async.controls.shell import Shell
from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import (
    ConfigError,
    UnsupportedError,
    VMNotFoundError,
    VMNotRunningError,
)
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.guests import GUESTS
from smolvm_async.images.local import local_path
from smolvm_async.images.s3.uri import parse_uri
from smolvm_async.qemu.shutdown import ShutdownReport
from smolvm_async.state.directory import cannot_use, check_data_dir
from smolvm_async.state.record import Status
from smolvm_async.state.registry import VMInfo, list_vms, prune_vms
from smolvm_async.vm.attach import AttachedVM
from smolvm_async.vm.block import Block
from smolvm_async.vm.find import find
from smolvm_async.vm.owner import OwnedVM
from smolvm_async.vm.plan import Plan, check_early, find_plan, make_plan
from smolvm_async.vm.run import VMRun


class AsyncSmolVM(Shell, Desktop, PortForwarding):
    """A disposable computer.

    ::

        async with AsyncSmolVM() as vm:
            print((await vm.run("uname -a")).stdout)

        async with AsyncSmolVM(os="windows", image="~/win11.qcow2", memory=4096) as vm:
            await vm.wait_for("ready")

    Leaving the block powers the guest down and deletes the VM (`keep=True` keeps it); leaving it
    by an exception or a cancellation kills it at once. If QEMU, swtpm or the guest dies meanwhile,
    the block is cancelled and raises `VMCrashedError`. Without `async with`: `start()`, `stop()`,
    `delete()`.

    Args:
        os: The guest OS: `"linux"` (the default, without an image) or `"windows"`; not for an
            `s3://` image, whose manifest records it.
        image: The qcow2 to start from: a path or a `file://` URI; or `s3://BUCKET/PREFIX/`, a
            published image, which is downloaded at the first start (see `ImageStore`). It is never
            written to, and any number of VMs can share it. A Linux one has cloud-init, or a server
            of its own for what one wants of it. Without one, the built-in Debian, which is built
            at its first use.
        kernel: A Linux kernel for QEMU to load, instead of the image's boot loader.
        initrd: Its initramfs.
        boot_args: Its command line; by default `console=ttyS0 root=/dev/vda rw`.
        user: As whom `run()` and the files log in to a Linux image: `"root"`, the default, or a
            user whom cloud-init is to make, with sudo.
        memory: MiB; for Windows at least 2048, by default 4096; for Linux 128, and 512.
        cpus: Cores, shown to the guest as one socket; by default 1, for Windows 2.
        vm_id: Lower-case letters, digits and hyphens; by default `vm-` and 8 hex digits.
        accel: `"auto"` takes KVM where it works, and TCG with a warning where it does not;
            `"kvm"` or `"tcg"` insists.
        env: Environment variables of all commands, set before it is `ready`. Not for Windows.
        port_forwards: What `expose_local()` is to forward from the start: guest ports, or
            `(guest_port, host_port)`.
        keep: Whether the VM outlives its block and its process: its disk, UEFI variables, TPM and
            keys stay together until `delete()`, and `from_id()` finds it again.
        resolution: Width and height of the screen in pixels, or `"WIDTHxHEIGHT"`, up to
            3840x2160; by default 1280x800. The guest may choose another.
        vnc: `"loopback"` or `"unix"` turns on the VNC server; see `VNC`.
        limits: What VMs may take of the host: a `Limits`, or a mapping of its names.
        mounts: Not for Windows guests, and not yet for Linux guests.
        writable_mounts: Likewise.
        internet_settings: Likewise.
        timeouts: Deadlines in seconds: a `Timeouts`, or a mapping of its names.
        data_dir: Where VMs keep their files while they exist; by default
            `$XDG_STATE_HOME/smolvm-async` (`~/.local/state/smolvm-async`).
        on_progress: Called with a `Progress` for each step.

    Raises:
        ConfigError: An argument is wrong (a `ValueError`); nothing was created.
        HostError: The host lacks something (a `ValueError`); nothing was created.
    """

    def __init__(
        self,
        *,
        os: Literal["windows", "linux"] | None = None,
        image: str | os_module.PathLike[str] | None = None,
        kernel: str | os_module.PathLike[str] | None = None,
        initrd: str | os_module.PathLike[str] | None = None,
        boot_args: str | None = None,
        user: str | None = None,
        memory: int | None = None,
        cpus: int | None = None,
        vm_id: str | None = None,
        accel: Literal["auto", "kvm", "tcg"] = "auto",
        env: Mapping[str, str] | None = None,
        port_forwards: Iterable[int | tuple[int, int | None]] | Mapping[int, int | None] = (),
        keep: bool = False,
        resolution: tuple[int, int] | str | None = None,
        vnc: Literal["loopback", "unix"] | bool | None = None,
        limits: Limits | Mapping[str, float] | None = None,
        mounts: Sequence[object] = (),
        writable_mounts: bool = False,
        internet_settings: object | None = None,
        timeouts: Timeouts | Mapping[str, float] | None = None,
        data_dir: str | os_module.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        features: dict[str, object] = {
            "mounts": mounts or writable_mounts,
            "internet_settings": internet_settings is not None,
        }
        config = make_config(
            os=os,
            image=image,
            kernel=kernel,
            initrd=initrd,
            boot_args=boot_args,
            user=user,
            env=env,
            port_forwards=port_forwards,
            memory=memory,
            cpus=cpus,
            vm_id=vm_id,
            accel=accel,
            keep=keep,
            resolution=resolution,
            vnc=vnc,
            limits=limits,
            timeouts=timeouts,
            data_dir=data_dir,
            features=features,
        )
        _check_progress(on_progress)
        if is_published(config.image):
            config = config.model_copy(update={"image": parse_uri(config.image).uri})
            features |= {"user": user, "env": env}
            handle = _published(config, features, on_progress)
        else:
            if config.image:
                config = config.model_copy(update={"image": str(local_path(config.image))})
            plan = make_plan(config, on_progress)
            handle = OwnedVM(config, lambda: plan)
            handle.plan()
        self._hold(handle, on_progress)

    def _hold(self, handle: OwnedVM | AttachedVM, on_progress: ProgressCallback | None) -> None:
        self._block = Block()
        self._on_progress = on_progress
        self._make_controls(handle)
        self._make_shell()
        self._attach(handle)

    @classmethod
    def _of_plan(cls, plan: Plan) -> Self:
        """One more VM of a kind that was looked up before, for fleets."""
        vm = cls.__new__(cls)
        vm._hold(OwnedVM(plan.config, lambda: plan), plan.on_progress)
        return vm

    async def _planned(self) -> Plan:
        """What the host has for it."""
        assert isinstance(self._vm, OwnedVM)
        return await self._vm.planned()

    @property
    def _run(self) -> VMRun | None:
        """Its processes, if they are this one's."""
        run = self._vm.run
        return run if isinstance(run, VMRun) else None

    def _attach(self, handle: OwnedVM | AttachedVM) -> None:
        self._vm: VM = handle
        self._control(handle)
        handle.on_crash = self._block.cancel

    @classmethod
    async def from_id(
        cls,
        vm_id: str,
        *,
        data_dir: str | os_module.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Self:
        """Find a VM by its id, in a later process or beside its owner.

        A running VM is attached to: everything works as for its owner, and `detach()`, or the
        end of an `async with` block, leaves it running. A kept VM at rest is the caller's:
        `start()` boots the same machine again.

        Args:
            vm_id: Its id; `list()` tells which there are.
            data_dir: See the class.
            on_progress: See the class; of an attached VM, its owner has the progress.

        Raises:
            VMNotFoundError: No VM has this id (a `ValueError`).
            VMNotRunningError: Its owner is alive and does not answer.
        """
        _check_progress(on_progress)
        path = _known_data_dir(data_dir) / check_vm_id(vm_id)
        vm = cls.__new__(cls)
        vm._hold(await find(path, lambda config: make_plan(config, on_progress)), on_progress)
        return vm

    @classmethod
    async def list(
        cls, *, data_dir: str | os_module.PathLike[str] | None = None
    ) -> Sequence[VMInfo]:
        """Every VM of this user, running or kept, the oldest first, and what dead owners left."""
        return await list_vms(_known_data_dir(data_dir))

    @classmethod
    async def prune(
        cls, *, data_dir: str | os_module.PathLike[str] | None = None
    ) -> Sequence[VMInfo]:
        """End and remove what dead owners left; a kept VM of theirs stays, `stopped`.

        Returns:
            What was found, as it was before.
        """
        return await prune_vms(_known_data_dir(data_dir))

    def __repr__(self) -> str:
        return f"<AsyncSmolVM {self.vm_id} {self._vm.config.os} {self.status}>"

    @property
    def vm_id(self) -> str:
        """Its id; also the name of its directory."""
        return self._vm.config.vm_id

    @property
    def status(self) -> Status:
        """What the VM is doing."""
        return self._vm.status

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`: what QEMU runs the guest with; empty before that is known."""
        return self._vm.accelerator

    async def __aenter__(self) -> Self:
        if self._block.entered:
            raise ConfigError(f"{self.vm_id} is in an async with block already: use it there.")
        await self.start()
        self._block.enter()
        if self.status is Status.CRASHED:  # before there was a block to cancel
            await self._leave(None)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        vm = self._vm

        def crash() -> Exception | None:
            failure = vm.run.failure if vm.run else None
            # A VMNotRunningError only says that this process has been detached from the VM.
            return None if isinstance(failure, VMNotRunningError) else failure

        await self._block.leave(vm.leave(graceful=error is None), error, crash)

    async def start(self) -> None:
        """Start the VM; returns when the guest's processors run. A running VM is left alone.

        A kept VM that was stopped boots again, with its disk, UEFI variables and TPM; any other
        starts afresh from its image. Cancelled, it leaves nothing behind.

        Raises:
            LaunchError: QEMU or swtpm did not start.
            VMAlreadyExistsError: Another VM has this id.
            HostError: The VM does not fit into the host's memory; with the figures.
            ImageError: The image has changed since, or cannot be had or used.
            VMNotRunningError: The VM was deleted, or stopped while it started.
        """
        await self._look_again()
        await self._vm.start()

    async def _look_again(self) -> None:
        """Once we are not attached any more: attach again, or take it over if it is at rest."""
        if isinstance(self._vm, AttachedVM) and self._vm.over.done():
            config = self._vm.config
            handle = await find(
                config.data_dir / config.vm_id, lambda found: make_plan(found, self._on_progress)
            )
            self._attach(handle)

    async def stop(self, timeout: float | None = None) -> ShutdownReport:
        """Power the guest down, and climb the shutdown ladder if it does not.

        A kept VM can be started again. Of any other, the TPM's state and the UEFI variables are
        gone afterwards; the rest goes with `delete()`. Cancelled, it kills the VM at once.

        Args:
            timeout: Seconds for the guest to power down, instead of `Timeouts.powerdown`;
                0 leaves the power button out.

        Returns:
            Which rung ended the VM, and how long each took.
        """
        check_timeout(timeout)
        return await self._vm.stop(timeout)

    async def pause(self) -> None:
        """Stop the guest's processors; a paused VM is left alone.

        Raises:
            VMNotRunningError: It does not run.
        """
        running(self._vm)
        await self._vm.pause()

    async def resume(self) -> None:
        """Let the guest's processors run again, where they stood.

        Raises:
            VMNotRunningError: It does not run.
        """
        running(self._vm)
        await self._vm.resume()

    async def delete(self) -> None:
        """Remove the VM and everything of it; one that still runs is killed first.

        Raises:
            VMAlreadyExistsError: It was at rest, and another process has started it meanwhile.
        """
        with suppress(VMNotFoundError):  # it has been deleted already
            await self._look_again()
        await self._vm.delete()

    async def ssh_access(self) -> Access:
        """How to log in to a Linux guest with an SSH client of one's own.

        Raises:
            VMNotRunningError: It does not run.
            UnsupportedError: This is a Windows guest.
        """
        self._vm.config.profile.require("run")
        return await running(self._vm).ssh_access()

    async def detach(self) -> None:
        """Let go of a VM that `from_id()` attached to; it goes on under its owner.

        Raises:
            ConfigError: The VM is this process's own.
        """
        await self._vm.detach()

    async def snapshot(self, name: str | None = None) -> NoReturn:
        """Not in this version: raises `UnsupportedError`."""
        raise UnsupportedError(self._vm.config.profile.unsupported["snapshot"])

    @classmethod
    async def from_snapshot(cls, name: str, **options: object) -> NoReturn:
        """Not in this version: raises `UnsupportedError`."""
        guest = GUESTS["windows" if options.get("os") == "windows" else "linux"]
        raise UnsupportedError(guest.unsupported["from_snapshot"])


def _published(
    config: VMConfig, features: Mapping[str, object], on_progress: ProgressCallback | None
) -> OwnedVM:
    """A VM of a published image: the network is not asked before it starts."""
    check_early(config)

    def make_plan_now() -> NoReturn:
        raise AssertionError("start() reads the manifest first")

    return OwnedVM(
        config, make_plan_now, find_plan=lambda: find_plan(config, features, on_progress)
    )


def _known_data_dir(data_dir: object) -> Path:
    path = make_data_dir(data_dir)
    try:
        there = path.exists()
    except OSError as error:
        raise cannot_use(path, error) from error
    if there:
        check_data_dir(path)
    return path


def _check_progress(on_progress: object) -> None:
    if on_progress is not None and not callable(on_progress):
        raise ConfigError(f"on_progress={on_progress!r} is wrong: pass a function.")
