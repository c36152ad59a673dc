"""`image`: publish images to S3, download them, and manage the images on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import smolvm_async
from smolvm_async.cli.command import FAILED, Json, execute
from smolvm_async.cli.output import in_units, say, show_table, transfer, write_json
from smolvm_async.guests import GuestName

if TYPE_CHECKING:
    from smolvm_async import CachedImage

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
COLUMNS: dict[str, dict[str, Any]] = {
    "NAME": {"no_wrap": True},
    "OS": {},
    "SIZE": {"justify": "right", "no_wrap": True},
    "USED": {"no_wrap": True},
    "URI": {"overflow": "fold"},
}

image = typer.Typer(
    name="image",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Publish images to S3, download them, and manage those on this machine.",
)

ImageDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="The directory of the images.",
        show_default="$SMOLVM_IMAGE_DIR, or ~/.cache/smolvm-async/images",
    ),
]
Which = Annotated[str, typer.Argument(metavar="NAME_OR_URI", help="The image's name, or its URI.")]
Uri = Annotated[
    str,
    typer.Argument(
        metavar="URI", help="s3://BUCKET/PREFIX/, or the URI of the manifest, which ends in .json."
    ),
]


@image.command()
def push(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIRECTORY",
            help="The directory with the qcow2, and with the kernel and initramfs if the image has "
            "them.",
        ),
    ],
    uri: Uri,
    name: Annotated[
        str | None,
        typer.Option(help="The image's name.", show_default="the last part of the prefix"),
    ] = None,
    os: Annotated[
        GuestName | None,
        typer.Option(help="The guest OS.", show_default="linux, if there is a kernel"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(metavar="MIB", help="Memory to recommend to users.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores to recommend to users.")] = None,
    boot_args: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The kernel's command line.")
    ] = None,
    compress: Annotated[Literal["zstd"] | None, typer.Option(help="Compress the disk.")] = None,
    json: Json = False,
) -> None:
    """Publish the image in a directory.

    A smolvm-image.json in the directory names the image's files. Without this file, the names must
    be disk.qcow2 (or a single qcow2), vmlinuz or kernel, initrd, boot_args.
    """
    with transfer(f"pushing {directory}", json=json) as show:
        push = smolvm_async.push_image(
            directory,
            uri,
            name=name,
            os=os,
            memory=memory,
            cpus=cpus,
            boot_args=boot_args,
            compress=compress,
            on_progress=show,
        )
        manifest = execute(push, json=json)
    if json:
        write_json({"uri": uri, "manifest": manifest.model_dump(mode="json", exclude_none=True)})
    else:
        size = sum(file.size or 0 for file in manifest.files.values())
        say(f"{manifest.name} is published at {uri} ({in_units(size)}).")


@image.command()
def pull(uri: Uri, image_dir: ImageDir = None, json: Json = False) -> None:
    """Download a published image, or only its missing files."""
    with transfer(f"pulling {uri}", json=json) as show:
        pulled = execute(
            lambda: smolvm_async.ImageStore(image_dir).pull(uri, on_progress=show), json=json
        )
    if json:
        write_json(asdict(pulled))
    else:
        say(f"{pulled.name} is downloaded ({pulled.os}, {in_units(pulled.size)}): {pulled.disk}")


@image.command("list")
def list_images(image_dir: ImageDir = None, json: Json = False) -> None:
    """Show the images on this machine, the most recently used first."""
    images = execute(lambda: smolvm_async.ImageStore(image_dir).list(), json=json)
    if json:
        write_json([asdict(one) for one in images])
    elif images:
        show_table(COLUMNS, [_row(one) for one in images])
    else:
        say("There are no images.")


@image.command()
def remove(name_or_uri: Which, image_dir: ImageDir = None, json: Json = False) -> None:
    """Remove an image from this machine, unless a VM needs it."""
    _tell_gone(
        execute(lambda: smolvm_async.ImageStore(image_dir).remove(name_or_uri), json=json), json
    )


@image.command()
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove the least recently used images until the rest fits into SIZE: 500M, 20G.",
        ),
    ] = None,
    unused_days: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", min=0, max=36_500, help="Remove images that were unused for DAYS."
        ),
    ] = None,
    image_dir: ImageDir = None,
    json: Json = False,
) -> None:
    """Remove leftovers, such as parts of cancelled downloads; with options, also old images.

    Images that a VM needs are kept.
    """
    since = datetime.now() - timedelta(days=unused_days) if unused_days is not None else None
    most = _bytes(max_size)

    async def work() -> Sequence[CachedImage]:
        return await smolvm_async.ImageStore(image_dir).prune(max_bytes=most, unused_since=since)

    _tell_gone(execute(work(), json=json), json)


@image.command()
def verify(
    name_or_uri: Annotated[
        str | None,
        typer.Argument(metavar="[NAME_OR_URI]", help="An image; by default, all."),
    ] = None,
    image_dir: ImageDir = None,
    json: Json = False,
) -> None:
    """Compare all files with their digests. Damaged files are removed, unless a VM needs them."""
    damages = execute(lambda: smolvm_async.ImageStore(image_dir).verify(name_or_uri), json=json)
    if json:
        write_json([damage._asdict() for damage in damages])
    for damage in () if json else damages:
        end = (
            "the file was removed: pull the image again"
            if damage.removed
            else "the file stays: a VM needs the image"
        )
        say(f"{damage.path} is {'damaged' if damage.actual else 'missing'}; {end}.")
    if damages:
        raise typer.Exit(FAILED)
    if not json:
        say("All files match their manifests.")


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(iB|B)?", size, re.IGNORECASE)
    if match is None:
        raise typer.BadParameter("pass bytes, such as 500M or 20G", param_hint="--max-size")
    return int(match[1]) * UNITS[match[2].upper()]


def _row(one: CachedImage) -> list[str]:
    used = datetime.fromtimestamp(one.used).isoformat(" ", "minutes")
    return [one.name, one.os, in_units(one.size), used, one.uri]


def _tell_gone(gone: Sequence[CachedImage], json: bool) -> None:
    if json:
        write_json([asdict(one) for one in gone])
        return
    for one in gone:
        say(f"Removed {one.name} ({one.uri}).")
    if not gone:
        say("Nothing to remove.")
