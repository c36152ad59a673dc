"""The features that a guest OS may lack, with a workaround for each feature."""

from __future__ import annotations

from typing import Literal, NamedTuple

FeatureName = Literal[
    "commands",
    "processes",
    "detached",
    "terminals",
    "ssh",
    "files",
    "variables",
    "user",
    "account",
    "kernel",
    "mounts",
]
Channel = Literal["ssh", "agent"]  # SSH, or the QEMU guest agent


BY_NETWORK = (
    "Put the files into the image, or exchange them with a server on this host: "
    "internet_settings={'allowed_host_ports': [8000]} lets the guest reach port 8000 of this host, "
    "as 10.0.2.2:8000."
)


class Feature(NamedTuple):
    """The names of the VM methods and the `AsyncSmolVM` arguments that need a feature."""

    methods: tuple[str, ...]
    arguments: tuple[str, ...]
    instead: str  # advice for users of a guest OS without the feature


FEATURES: dict[FeatureName, Feature] = {
    "commands": Feature(
        ("run", "run_stream", "guest_info"),
        (),
        "Install the program as a service or a scheduled task in the image.",
    ),
    "processes": Feature(
        ("spawn",),
        (),
        "Use run() with input=, or run_stream(), or the QEMU guest agent in the image.",
    ),
    "detached": Feature(
        ("spawn(detached=True)",),
        (),
        "OpenSSH for Windows ends all processes of a session with the session: start the program "
        "as a scheduled task (Register-ScheduledTask), or use the QEMU guest agent in the image.",
    ),
    "terminals": Feature(
        ("open_terminal",),
        (),
        "Commands without a terminal work, and read their input: spawn(), or run() with input=.",
    ),
    "ssh": Feature(
        ("ssh_access",),
        (),
        "Install an SSH server in the image, and reach its port with expose_local(22).",
    ),
    "files": Feature(
        (
            *("upload_file", "download_file", "read_file", "write_file", "list_files", "remove"),
            *("make_directory", "exists"),
        ),
        (),
        BY_NETWORK,
    ),
    "variables": Feature(
        ("set_env_vars", "unset_env_vars", "list_env_vars"),
        ("env",),
        "Set the variables inside the image.",
    ),
    "user": Feature((), ("user",), "Leave user= out: the image defines its own users."),
    "account": Feature(
        (),
        ("password", "key"),
        "Leave password= and key= out: they are for Windows images that have an SSH server.",
    ),
    "kernel": Feature(
        (),
        ("kernel", "initrd", "boot_args"),
        "Pass only image=, without kernel=, initrd= and boot_args=: the image's boot loader starts "
        "the guest.",
    ),
    "mounts": Feature(
        (),
        ("mounts", "writable_mounts"),
        f"Copy the files with upload_file(), if the guest supports it. {BY_NETWORK}",
    ),
}

NEEDED: dict[str, FeatureName] = {  # method or argument -> the feature that it needs
    name: feature for feature, row in FEATURES.items() for name in (*row.methods, *row.arguments)
}
OF_ACCOUNTS: frozenset[FeatureName] = frozenset({"user", "account", "ssh"})
NEED_SSH: frozenset[FeatureName] = frozenset({"terminals", "ssh", "user", "mounts"})
ARGUMENTS = tuple(name for row in FEATURES.values() for name in row.arguments)
