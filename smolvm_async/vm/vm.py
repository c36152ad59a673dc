"""`AsyncSmolVM`, the public class: a VM's life from its arguments to `delete()`."""

from __future__ import annotations

import asyncio
import os as os_module
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from smolvm_async.config.checks import check_boolean, check_timeout, check_vm_id, shown
from smolvm_async.config.options import (
    VMOptions,
    check_internet_settings,
    check_password,
    check_progress,
    make_config,
    make_data_dir,
    with_signature,
)
from smolvm_async.config.source import PublishedImage
from smolvm_async.controls.desktop.desktop import Desktop
from smolvm_async.controls.interface import VM, in_use, running, usable, wake
from smolvm_async.controls.ports import PortForwarding
from smolvm_async.controls.shell import Shell
from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import (
    ConfigError,
    ConnectionLostError,
    VMNotFoundError,
    VMNotRunningError,
)
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.qemu.shutdown import ShutdownReport
from smolvm_async.state.status import Status
from smolvm_async.vm.block import Block

if TYPE_CHECKING:  # imported on first use
    from smolvm_async.config.internet import InternetSettings
    from smolvm_async.config.options import CloneOptions
    from smolvm_async.state.registry import VMInfo
    from smolvm_async.state.snapshot_record import SnapshotInfo
    from smolvm_async.vm.attach.client import AttachedVM
    from smolvm_async.vm.clones import Starting
    from smolvm_async.vm.owner import OwnedVM
    from smolvm_async.vm.plan import Plan
    from smolvm_async.vm.run import VMRun
    from smolvm_async.vm.stats import VMStats


class AsyncSmolVM(Shell, Desktop, PortForwarding):
    """A disposable virtual machine.

    ::

        async with AsyncSmolVM() as vm:
            print((await vm.run("uname -a")).stdout)

        async with AsyncSmolVM(os="windows", image="~/win11.qcow2", memory=4096) as vm:
            await vm.wait_for("ready")

    Leaving the block powers the guest down and deletes the VM (`keep=True` keeps the VM). An
    exception or a cancellation kills the VM at once. If QEMU, swtpm or the guest crashes,
    the block is cancelled and raises `VMCrashedError`. Without `async with`, use `start()`,
    `stop()` and `delete()`.

    Args:
        os: The guest OS: `"linux"` (the default without an image) or `"windows"`. Leave it out for
            an `s3://` image, whose manifest records the guest OS.
        image: The qcow2 to start from: a path or a `file://` URI; or `s3://BUCKET/PREFIX/`, a
            published image, which the first start downloads (see `ImageStore`). A VM never
            writes to its image, so any number of VMs can share an image. A Linux image needs
            cloud-init, or the QEMU guest agent (see `channel`); without either, `run()` and file
            transfer do not work. By default, the built-in Debian, which the library builds at its
            first use.
        kernel: A Linux kernel for QEMU to load, instead of the image's boot loader.
        initrd: The kernel's initramfs.
        boot_args: The kernel's command line; by default `console=ttyS0 root=/dev/vda rw`.
        user: The login user of `run()` and file transfer in a Linux image: `"root"`, the default,
            or a user with sudo that cloud-init creates. In a Windows image with an SSH server:
            the user who logs in, by default `"Administrator"`.
        password: The password of `user` in a Windows image that has OpenSSH: then commands and
            files go over SSH, and the agent is not needed. The VM's files and logs never have the
            password. The first login shows the server's host key, which all later ones require.
        key: The file of the user's private key for the same, without a passphrase, which only you
            can read.
        channel: The way to run commands: `"ssh"`, the default for Linux, or `"agent"`, the default
            for Windows (without `password` and `key`): the QEMU guest agent in the image, which
            needs no network and no login. A Linux guest that is used through its agent has no
            `open_terminal()` and `mounts`.
        memory: Memory in MiB. The guest OS sets the minimum and the default (Linux: 128 and 512).
        cpus: The number of cores, all in one socket. The guest OS sets the default (Linux: 1).
        vm_id: The id: lower-case letters, digits, hyphens; by default `vm-` and 8 hex digits.
        accel: `"auto"` uses KVM if it works, else TCG with a warning. `"kvm"` and `"tcg"` never
            use the other accelerator.
        env: Environment variables of all commands, set before the VM is `ready`. Only for guests
            that support `run()`.
        port_forwards: The ports to forward from the start, as `expose_local()` does: guest ports,
            or `(guest_port, host_port)`.
        keep: Whether the VM outlives its block and its process: its disk, UEFI variables, TPM and
            keys stay together until `delete()`, and `from_id()` finds the VM again.
        boot: `"cold"` boots the guest. `"warm"`, the default for the built-in Debian and only
            possible there, starts from a snapshot of a guest that is ready; the first start of a
            size makes the snapshot. A kept VM that starts again always boots.
        resolution: Width and height of the screen in pixels, or `"WIDTHxHEIGHT"`, up to
            3840x2160; by default 1280x800. The guest may choose another resolution.
        vnc: `"loopback"` or `"unix"` turns on the VNC server; see `VNC`.
        limits: Limits on the host's resources: a `Limits`, or a mapping with its field names.
        mounts: Host directories for a Linux guest, as `SRC[:DST][:rw|:ro]`; DST is by default
            `/workspace/NAME`. The guest may write, but to a layer of its own on its disk: the
            host's files change only with `:rw`. The directories are mounted when it is `ready`.
        writable_mounts: Whether the guest may change the directories without `:rw` or `:ro`, too.
        internet_settings: The network policy: an `InternetSettings`, or a mapping of its fields. By
            default, a guest reaches the internet and the local network, but not this host.
        timeouts: Deadlines in seconds: a `Timeouts`, or a mapping with its field names.
        labels: Texts for your own use, by name; `list()` shows them and finds VMs by them.
        ttl: Seconds from the first start after which the VM is deleted, kept or not. Later calls
            raise `VMExpiredError`. QEMU and swtpm end in time even if this process's event loop
            hangs; the files go when the loop goes on, or at the next `list()` or `prune()` of any
            process. If this whole process is stopped (SIGSTOP), or native code holds the
            interpreter, that `list()` or `prune()` also ends QEMU and swtpm.
        idle_timeout: Seconds without a call after which the VM is paused, from `ready` on. The next
            call resumes it first, in any process. A command, transfer, process or terminal that
            runs counts as a call, and `stats()` does not; neither do clients of forwarded ports and
            of VNC, and detached processes. A VM that `pause()` has paused stays paused.
        data_dir: The directory for the files of VMs; by default `$XDG_STATE_HOME/smolvm-async`
            (`~/.local/state/smolvm-async`).
        on_progress: Called with a `Progress` for each step.

    Raises:
        ConfigError: An argument is wrong (a `ValueError`); nothing was created.
        HostError: The host lacks something (a `ValueError`); nothing was created.
    """

    @with_signature
    def __init__(self, **options: Unpack[VMOptions]) -> None:
        from smolvm_async.vm.owner import OwnedVM
        from smolvm_async.vm.plan import check_early, find_plan, make_plan

        config, on_progress = make_config(**options), options.get("on_progress")
        if isinstance(config.origin, PublishedImage):
            check_early(config)  # start() reads the manifest: nothing before it uses the network
            owned = OwnedVM(config, partial(find_plan, config, on_progress))
        else:
            owned = OwnedVM(config, make_plan(config, on_progress))
        self._hold(owned, on_progress)

    def _hold(self, handle: OwnedVM | AttachedVM, on_progress: ProgressCallback | None) -> None:
        self._process = this_process()
        self._block = Block()
        self._on_progress = on_progress
        self._make_controls(handle)
        self._attach(handle)

    @classmethod
    def _of_plan(
        cls, plan: Plan, find: Callable[[], Coroutine[Any, Any, Plan]] | None = None
    ) -> Self:
        """Return a VM that has this plan, or the plan that `find` returns when the VM starts.

        Fleets make a plan once for many VMs.
        """
        from smolvm_async.vm.owner import OwnedVM

        vm = cls.__new__(cls)
        vm._hold(OwnedVM(plan.config, find or plan), plan.on_progress)
        return vm

    @property
    def _owned(self) -> OwnedVM | None:
        """The object for the VM, if this process owns the VM."""
        from smolvm_async.vm.owner import OwnedVM

        return self._vm if isinstance(self._vm, OwnedVM) else None

    async def _planned(self) -> Plan:
        """Return the plan. For a published image, read the manifest first."""
        owned = self._owned
        assert owned is not None
        return await owned.planned()

    @property
    def _run(self) -> VMRun | None:
        """The current run, if this process owns the VM."""
        return None if (owned := self._owned) is None else owned.run

    @property
    def _vm(self) -> VM:
        """The object for the VM. A forked child must not use the object of its parent."""
        return usable(self._handle, self._process)

    @_vm.setter
    def _vm(self, handle: VM) -> None:
        self._handle = handle

    def _attach(self, handle: OwnedVM | AttachedVM) -> None:
        self._vm = handle
        self._control(handle)
        handle.on_crash = self._block.cancel

    @classmethod
    async def from_id(
        cls,
        vm_id: str,
        *,
        password: str | None = None,
        data_dir: str | os_module.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Self:
        """Find a VM by its id, in a later process or in a process that runs beside the owner.

        If another process runs the VM, attach to the VM: everything works as for the owner, and
        `detach()`, or the end of an `async with` block, leaves the VM running. If nobody runs a
        kept VM, the caller becomes its owner: `start()` boots the same machine again.

        Args:
            vm_id: The VM's id; `list()` shows all ids.
            password: See the class; for a kept VM that `start()` boots again.
            data_dir: See the class.
            on_progress: See the class. For an attached VM, only the owner gets the progress.

        Raises:
            VMNotFoundError: No VM has this id (a `ValueError`).
            VMElsewhereError: The VM belongs to another host that shares `data_dir`.
            VMNotRunningError: The owner is alive but does not answer.
        """
        from smolvm_async.vm.find import find

        check_progress(on_progress)
        path = _known_data_dir(data_dir) / check_vm_id(vm_id)
        vm = cls.__new__(cls)
        vm._hold(await find(path, on_progress, check_password(password)), on_progress)
        return vm

    @classmethod
    async def list(
        cls,
        *,
        labels: Mapping[str, str] | None = None,
        data_dir: str | os_module.PathLike[str] | None = None,
    ) -> Sequence[VMInfo]:
        """Return the VMs in `data_dir`, the oldest first: running, kept and orphaned.

        Delete the VMs whose `ttl` is over.

        Args:
            labels: Return only VMs that have all these labels.
            data_dir: See the class.
        """
        from smolvm_async.config.checks import check_labels
        from smolvm_async.state.registry import list_vms

        return await list_vms(_known_data_dir(data_dir), check_labels(labels))

    @classmethod
    async def prune(
        cls,
        *,
        data_dir: str | os_module.PathLike[str] | None = None,
        gone_host: str | None = None,
        warm: bool = False,
    ) -> Sequence[VMInfo]:
        """Kill and remove the VMs whose owners died. A kept VM stays, with the status `stopped`.

        Also delete the VMs whose `ttl` is over, kept or not, even if their owner hangs.

        VMs of other hosts that share `data_dir` stay as they are.

        Args:
            data_dir: See the class.
            gone_host: The name of a host that never runs again; its owners count as dead. If the
                host does run, its running VMs lose their disks.
            warm: Whether to remove also all cached snapshots from which the built-in Debian starts
                (see `boot`), which all data directories share. VMs that run go on, and the next
                start makes its snapshot again.

        Returns:
            These VMs, with their status before the call.

        Raises:
            ConfigError: An argument is wrong.
        """
        from smolvm_async.state.registry import prune_vms

        if gone_host is not None and (not isinstance(gone_host, str) or not gone_host):
            raise ConfigError(
                f"gone_host={shown(gone_host)} is wrong: pass the `host` of a VM that list() shows."
            )
        check_boolean("warm", warm)
        pruned = await prune_vms(_known_data_dir(data_dir), gone_host)
        if warm:
            from smolvm_async.vm.warm import prune_ready_guests

            await prune_ready_guests()
        return pruned

    def __repr__(self) -> str:
        status = self.status if self._process.is_this else "of another process"
        return f"<AsyncSmolVM {self.vm_id} {self._handle.config.os} {status}>"

    @property
    def vm_id(self) -> str:
        """The VM's id, which is also the name of its directory."""
        return self._handle.config.vm_id

    @property
    def status(self) -> Status:
        """The VM's status, such as `running`."""
        return self._vm.status

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`; empty before `start()` has chosen one."""
        return self._vm.accelerator

    async def __aenter__(self) -> Self:
        usable(self._handle, self._process)
        if self._block.entered:
            raise ConfigError(
                f"{self.vm_id} is already in an async with block: use the VM inside that block."
            )
        await self.start()
        self._block.enter()
        if self.status is Status.CRASHED:  # the VM crashed before enter()
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
        if not self._process.is_this:  # only the parent ends the VM
            return
        vm = self._vm

        def crash() -> Exception | None:
            failure = vm.run.failure if vm.run else None
            # A VMNotRunningError only says that this process has been detached from the VM.
            return None if isinstance(failure, VMNotRunningError) else failure

        await self._block.leave(self._end(error), error, crash)

    async def _end(self, error: BaseException | None) -> None:
        """End the VM, or detach from it."""
        vm = self._vm
        try:
            # A crash also closes the connection to the guest, which the body may see first.
            if isinstance(error, ConnectionLostError) and vm.over is not None:
                from smolvm_async.qemu.launch import SAME_END

                await asyncio.wait([vm.over], timeout=SAME_END)
        finally:
            await vm.leave(graceful=error is None)

    async def start(self) -> None:
        """Start the VM, and return when the guest's processors run.

        A running VM stays as it is. A kept VM that was stopped boots again, with its disk, UEFI
        variables and TPM; any other VM starts from its image again. A cancelled start leaves
        no files or processes.

        Raises:
            LaunchError: QEMU or swtpm did not start.
            VMAlreadyExistsError: Another VM has this id; `VMElsewhereError` if on another host.
            HostError: The VM does not fit into the host's memory; the message has the figures.
            ImageError: The image was changed, or cannot be fetched or used.
            VMNotRunningError: The VM was deleted, or stopped while it started.
        """
        await self._look_again()
        await self._vm.start()

    async def _look_again(self) -> None:
        """Find the VM again if the connection to its owner has ended.

        Another process may own the VM by now. If nobody does, this process becomes the owner.
        """
        vm = self._vm
        if self._owned is None and vm.over is not None and vm.over.done():
            from smolvm_async.vm.find import find

            self._attach(await find(vm.config.data_dir / vm.config.vm_id, self._on_progress))

    async def stop(self, timeout: float | None = None) -> ShutdownReport:
        """Power the guest down; if that fails, try the next rungs of the ladder, up to SIGKILL.

        You can start a kept VM again. Any other VM loses its TPM's state and UEFI variables now,
        and its other files with `delete()`. A cancelled stop kills the VM at once.

        Args:
            timeout: Seconds for the guest to power down, instead of `Timeouts.powerdown`;
                0 skips the power button.

        Returns:
            The rung that ended the VM, and the duration of each rung.
        """
        check_timeout(timeout)
        return await self._vm.stop(timeout)

    async def pause(self) -> None:
        """Stop the guest's processors. A paused VM stays paused.

        Until `resume()`, commands and file transfers wait, and input raises `VMNotRunningError`.

        Raises:
            VMNotRunningError: The VM does not run.
        """
        running(self._vm)
        await self._vm.pause()

    async def resume(self) -> None:
        """Let the guest's processors run again after `pause()`.

        This also ends a pause by QEMU (as on a full disk) and wakes a guest that suspended itself.

        The clock of a paused guest stands still. So `resume()` sets the clock of a guest that is
        `ready` to the host's time, as root over SSH or through the guest's agent, before the
        waiting commands go on; it never turns the clock back. If this takes more than 5 s or fails,
        as without sudo, `resume()` logs a warning. A guest that is not `ready` gets the time when
        it becomes `ready`. In a Windows guest without the agent, the clock stays late until Windows
        itself corrects it.

        Raises:
            VMNotRunningError: The VM does not run, or QEMU has paused it again, as on a disk that
                is still full.
        """
        running(self._vm)
        await self._vm.resume()

    @property
    def internet_settings(self) -> InternetSettings:
        """The VM's network policy: see `set_internet_settings()`."""
        return self._handle.config.internet_settings

    async def set_internet_settings(
        self, settings: InternetSettings | Mapping[str, object]
    ) -> None:
        """Change the network policy. Connections that it does not allow any more end.

        The new policy is the policy of later starts, too, and of clones that are made from now on.
        Snapshots that exist keep theirs.

        Args:
            settings: The new policy as a whole, as for `internet_settings=`.

        Raises:
            ConfigError: The settings are wrong; nothing has changed.
            HostError: This host cannot guard a guest's network; nothing has changed.
        """
        if settings is None:
            raise ConfigError("settings=None is wrong: pass InternetSettings() for the default.")
        checked = check_internet_settings(settings)
        await self._look_again()
        await self._vm.set_internet_settings(checked)

    async def delete(self) -> None:
        """Delete the VM and all its files. If the VM runs, kill it first.

        Raises:
            VMAlreadyExistsError: The VM was stopped, but another process has started it.
        """
        with suppress(VMNotFoundError):  # another process has deleted the VM
            await self._look_again()
        await self._vm.delete()

    async def ssh_access(self) -> Access:
        """Return the port, the user and the keys or the password for an SSH client to log in.

        For a Linux guest, or a Windows guest with `password` or `key`, whose `host_key` is empty
        until the guest is `ready` for the first time.

        Raises:
            VMNotRunningError: The VM does not run.
            UnsupportedError: The library cannot log in to this guest OS.
        """
        self._vm.config.profile.require("ssh_access")
        return await (await in_use(self._vm)).ssh_access()

    async def stats(self) -> VMStats:
        """Return the resources that the running VM has used, seen from the host.

        Raises:
            VMNotRunningError: The VM does not run.
        """
        from smolvm_async.vm.stats import VMStats

        return VMStats(**await running(self._vm).stats())

    async def detach(self) -> None:
        """Disconnect from a VM that `from_id()` attached to. The owner keeps the VM running.

        Raises:
            ConfigError: This process owns the VM.
        """
        await self._vm.detach()

    async def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> SnapshotInfo:
        """Save the VM as it is: disk, UEFI variables, TPM, memory and devices, all of one moment.

        The VM may run, be paused, or be a kept VM at rest. A running VM goes on. Under KVM, its
        guest stands still for some milliseconds; under TCG, while its memory is copied: a tenth of
        a second after a boot, half a second for each 512 MiB of a clone, as after a warm start, and
        more on a busy host. Deadlines of commands go on. A paused VM stays paused; the second
        snapshot of one pause lets it run for an instant. The directories of `mounts=` are unmounted
        meanwhile. Snapshots share the layers of the disk with the VM and each other; after 16, the
        disk is flattened into one layer, which copies what the guest has written.

        The snapshot contains the guest's memory, and so its secrets. Only this user can read it.
        The VM's owner takes the snapshot: in another process, a cancelled call does not stop it.

        Args:
            name: A name like a VM id: lower-case letters, digits, hyphens.
            labels: Texts for your own use, which `snapshots()` shows.

        Raises:
            SnapshotExistsError: A snapshot with this name exists.
            SnapshotError: The snapshot could not be made, as on a full disk, or while a program of
                the guest uses a directory of `mounts=`; the VM is unharmed.
            VMNotRunningError: The VM does not run, and is not a kept VM at rest.
        """
        from smolvm_async.config.checks import check_labels, check_snapshot_name
        from smolvm_async.state.snapshot_record import SnapshotInfo

        name, checked = check_snapshot_name(name), check_labels(labels)
        await self._look_again()
        await wake(self._vm)
        return SnapshotInfo(**await self._vm.snapshot(name, checked))

    @classmethod
    async def snapshots(
        cls, *, data_dir: str | os_module.PathLike[str] | None = None
    ) -> Sequence[SnapshotInfo]:
        """Return all snapshots in `data_dir`, the oldest first."""
        from smolvm_async.state.snapshots import SNAPSHOTS, list_snapshots

        return await list_snapshots(_known_data_dir(data_dir) / SNAPSHOTS)

    @classmethod
    async def delete_snapshot(
        cls, name: str, *, data_dir: str | os_module.PathLike[str] | None = None
    ) -> None:
        """Delete a snapshot. VMs that were started from it, and other snapshots, stay.

        Raises:
            SnapshotNotFoundError: No snapshot has this name.
        """
        from smolvm_async.config.checks import check_snapshot_name
        from smolvm_async.state.snapshots import SNAPSHOTS, delete_snapshot

        await delete_snapshot(_known_data_dir(data_dir) / SNAPSHOTS, check_snapshot_name(name))

    @classmethod
    def from_snapshot(cls, name: str, **options: Unpack[CloneOptions]) -> Starting[Self]:
        """Start a VM from a snapshot.

        ::

            vm = await AsyncSmolVM.from_snapshot("name")

            async with AsyncSmolVM.from_snapshot("name") as vm:
                ...

        The guest of a snapshot that was taken of a running VM goes on where it was: no boot. First,
        the library gives a Linux guest new random numbers, the time, a host name, an SSH host key
        and login keys of its own. If the guest was not ready yet in the snapshot, this happens
        while the clone gets ready, after the clone was handed over. The connections of the original
        have ended in the clone. These stay the same: processes and files, the MAC address, the
        machine's UUID inside the guest, `/etc/machine-id`, the boot id if a program has read it
        before the snapshot, the TPM's endorsement key, a Windows computer's name and SID. A Windows
        guest gets only the time, through its agent, and a new generation id (vmgenid), from which
        Windows reseeds its random numbers. A Linux guest with `channel="agent"` gets no SSH keys.

        The snapshot fixes the guest OS, image, memory, cores and resolution. A snapshot of a kept
        VM at rest boots. Files that were changed are refused, but nothing shows who has made a
        snapshot, and QEMU loads the state of its devices: start only snapshots of people you trust.

        Args:
            name: The snapshot's name.
            options: `vm_id`, `password`, `accel`, `env`, `port_forwards`, `keep`, `vnc`, `limits`,
                `mounts`, `writable_mounts`, `internet_settings`, `timeouts`, `labels`, `ttl`,
                `idle_timeout`, `data_dir` and `on_progress`, as for the class. A clone has the
                network policy of its source, unless you pass another one, and no `mounts`,
                `labels`, `ttl` and `idle_timeout` that you do not pass.

        Raises:
            SnapshotNotFoundError: No snapshot has this name.
            SnapshotError: The snapshot is damaged, or cannot be used here: it needs the same kind
                of accelerator and processor, and the same QEMU or a later one.
            ImageError: The image was changed after the snapshot was taken.
            LaunchError, ...: See `start()`.
        """
        from smolvm_async.config.checks import check_snapshot_name
        from smolvm_async.config.options import check_clone_options
        from smolvm_async.vm.clones import Starting, restore

        check_snapshot_name(name)
        check_clone_options(options, "from_snapshot()")
        data_dir = _known_data_dir(options.get("data_dir"))
        return Starting(lambda: restore(cls, name, options, data_dir), lambda vms: vms[0])

    def fork(self, count: int = 1, **options: Unpack[CloneOptions]) -> Starting[Sequence[Self]]:
        """Start live copies of the running VM, all at once; the VM itself goes on.

        ::

            async with vm.fork(8) as clones:
                ...

            clones = await vm.fork(8)  # delete() each of them

        See `from_snapshot()` for what a clone has of its own, and `snapshot()` for what the
        original notices. Nothing of the snapshot in between is left.

        Args:
            count: The number of copies.
            options: As for `from_snapshot()`, but no `vm_id`.

        Raises:
            HostError: So many copies certainly do not fit into the host's memory.
            VMNotRunningError: The VM does not run.
            SnapshotError, LaunchError, ...: See `snapshot()` and `from_snapshot()`.
        """
        from smolvm_async.config.checks import check_integer
        from smolvm_async.config.options import check_clone_options, make_clone_config
        from smolvm_async.vm.clones import Starting, fork
        from smolvm_async.vm.plan import check_host_directories

        check_integer("count", count, 1, 1000, "a whole number from 1 to 1000")
        check_clone_options(options, "fork()")
        if options.get("vm_id") is not None:
            raise ConfigError("vm_id= cannot be given: each clone gets an id of its own.")
        config = make_clone_config(self._vm.config, **options)  # before the guest stands still
        check_host_directories(config)
        if count > 1 and any(forward.host_port is not None for forward in config.port_forwards):
            message = "port_forwards= cannot have a port of the host: the clones cannot share it."
            raise ConfigError(f"{message} Pass only ports of the guest.")
        running(self._vm)
        options.setdefault("password", self._vm.config.password)
        return Starting(lambda: fork(self, count, options), lambda vms: vms)


def _known_data_dir(data_dir: object) -> Path:
    from smolvm_async.state.directory import cannot_use, check_data_dir

    path = make_data_dir(data_dir)
    try:
        there = path.exists()
    except OSError as error:
        raise cannot_use(path, error) from error
    if there:
        check_data_dir(path)
    return path
