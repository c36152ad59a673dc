"""`image`: published images, to S3, from S3, and those that are on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import typer

from smolvm_async import CachedImage, ImageStore, push_image
from smolvm_async.cli.execution import FAILED, execute
from smolvm_async.cli.options import Json
from smolvm_async.cli.output import say, show_table, transfer, write_json

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
COLUMNS: dict[str, dict[str, Any]] = {
    "NAME": {"no_wrap": True},
    "OS": {},
    "SIZE": {"justify": "right", "no_wrap": True},
    "USED": {"no_wrap": True},
    "URI": {"overflow": "fold"},
}

image = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Published images: to S3, from S3, and those on this machine.",
)

ImageDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Where the images are.",
        show_default="$SMOLVM_IMAGE_DIR, or ~/.cache/smolvm-async/images",
    ),
]
Which = Annotated[str, typer.Argument(metavar="NAME_OR_URI", help="The image's name, or its URI.")]
Uri = Annotated[
    str,
    typer.Argument(
        metavar="URI", help="s3://BUCKET/PREFIX/, or that of the manifest, which ends in .json."
    ),
]


@image.command()
def push(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIRECTORY", help="A qcow2; and a kernel, an initramfs, boot_args, if any."
        ),
    ],
    uri: Uri,
    name: Annotated[
        str | None,
        typer.Option(help="What people call it.", show_default="the last part of the prefix"),
    ] = None,
    os: Annotated[
        Literal["linux", "windows"] | None,
        typer.Option(help="The guest OS.", show_default="linux, if there is a kernel"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(metavar="MIB", help="Memory that it is best run with.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores, likewise.")] = None,
    boot_args: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The kernel's command line.")
    ] = None,
    compress: Annotated[Literal["zstd"] | None, typer.Option(help="Compress the disk.")] = None,
    json: Json = False,
) -> None:
    """Publish the image in a directory.

    A smolvm-image.json there says what its files are; without one they are recognized by their
    names: disk.qcow2 (or any one qcow2), vmlinuz or kernel, initrd, boot_args.
    """
    options: dict[str, Any] = {
        "name": name,
        "os": os,
        "memory": memory,
        "cpus": cpus,
        "boot_args": boot_args,
        "compress": compress,
    }
    with transfer(f"pushing {directory}", json=json) as show:
        manifest = execute(push_image(directory, uri, **options, on_progress=show), json=json)
    if json:
        write_json({"uri": uri, "manifest": manifest.model_dump(mode="json", exclude_none=True)})
    else:
        size = sum(file.size or 0 for file in manifest.files.values())
        say(f"{manifest.name} is published at {uri} ({_size(size)}).")


@image.command()
def pull(uri: Uri, image_dir: ImageDir = None, json: Json = False) -> None:
    """Download a published image, or what of it is not here yet."""
    with transfer(f"pulling {uri}", json=json) as show:
        pulled = execute(ImageStore(image_dir).pull(uri, on_progress=show), json=json)
    if json:
        write_json(asdict(pulled))
    else:
        say(f"{pulled.name} is here ({pulled.os}, {_size(pulled.size)}): {pulled.disk}")


@image.command("list")
def list_images(image_dir: ImageDir = None, json: Json = False) -> None:
    """Show the images on this machine, the most recently used first."""
    images = execute(ImageStore(image_dir).list(), json=json)
    if json:
        write_json([asdict(one) for one in images])
    elif images:
        show_table(COLUMNS, [_row(one) for one in images])
    else:
        say("There are no images.")


@image.command()
def remove(name_or_uri: Which, image_dir: ImageDir = None, json: Json = False) -> None:
    """Remove an image from this machine; one that a VM needs is refused."""
    _tell_gone(execute(ImageStore(image_dir).remove(name_or_uri), json=json), json)


@image.command()
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove the longest unused images until the rest has at most this: 500M, 20G.",
        ),
    ] = None,
    unused_days: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, max=36_500, help="Remove those unused for so long."),
    ] = None,
    image_dir: ImageDir = None,
    json: Json = False,
) -> None:
    """Remove what no image needs any more, such as rests of downloads; and images, if asked to.

    An image that a VM needs stays.
    """
    since = datetime.now() - timedelta(days=unused_days) if unused_days is not None else None
    store = ImageStore(image_dir)
    work = store.prune(max_bytes=_bytes(max_size), unused_since=since)
    _tell_gone(execute(work, json=json), json)


@image.command()
def verify(
    name_or_uri: Annotated[
        str | None,
        typer.Argument(metavar="[NAME_OR_URI]", help="An image; left out, all of them."),
    ] = None,
    image_dir: ImageDir = None,
    json: Json = False,
) -> None:
    """Read every file, and compare its digest; a damaged one is removed, unless a VM needs it."""
    damages = execute(ImageStore(image_dir).verify(name_or_uri), json=json)
    if json:
        write_json([damage._asdict() for damage in damages])
    for damage in () if json else damages:
        end = "it is removed: pull it again" if damage.removed else "a VM needs it: it stays"
        say(f"{damage.path} is {'damaged' if damage.actual else 'gone'}; {end}.")
    if damages:
        raise typer.Exit(FAILED)
    if not json:
        say("All is as it was published.")


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(iB|B)?", size, re.IGNORECASE)
    if match is None:
        raise typer.BadParameter("pass bytes, or such as 500M or 20G", param_hint="--max-size")
    return int(match[1]) * UNITS[match[2].upper()]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _row(one: CachedImage) -> list[str]:
    used = datetime.fromtimestamp(one.used).isoformat(" ", "minutes")
    return [one.name, one.os, _size(one.size), used, one.uri]


def _tell_gone(gone: Sequence[CachedImage], json: bool) -> None:
    if json:
        write_json([asdict(one) for one in gone])
        return
    for one in gone:
        say(f"{one.name} ({one.uri}) is removed.")
    if not gone:
        say("No image had to go.")
