"""The S3 client: aioboto3's client with boto3's settings, created without blocking the event loop.

Creating the first client takes half a second, to import modules and parse megabytes of JSON. This
happens in a thread; requests run in the event loop as usual.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from smolvm_async.errors import ConfigError, ImageError
from smolvm_async.foundation.fork import private
from smolvm_async.foundation.tasks import in_background, no_collection, settle
from smolvm_async.images.s3.errors import explain

ENDPOINT = "SMOLVM_S3_ENDPOINT_URL"
KEY_ID, SECRET = "SMOLVM_S3_ACCESS_KEY_ID", "SMOLVM_S3_SECRET_ACCESS_KEY"
CONNECTIONS = 8  # connections that the downloads of one event loop use at a time
ATTEMPTS = 5  # tries of the client library for each request
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds; READ_TIMEOUT limits the wait for each piece
CONNECT_TIMEOUT_HURRIED, READ_TIMEOUT_HURRIED = 3, 10  # seconds, for callers with a cached image
MAX_ERROR_BODY = 1 << 20  # bytes of an error's body to read at most


def endpoint() -> str:
    """Return the URL in `SMOLVM_S3_ENDPOINT_URL`, for a server other than AWS; "" if unset."""
    return os.environ.get(ENDPOINT, "")


@asynccontextmanager
async def open_client(*, hurried: bool = False) -> AsyncIterator[Any]:
    """Open an S3 client with boto3's settings: environment, configuration files, profile, role.

    Args:
        hurried: Give up early if the endpoint does not answer; for callers with a cached image.
    """
    options = {**_own_credentials(), "endpoint_url": endpoint() or None}
    try:
        context, client = await in_background(_create, options, hurried)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"The S3 settings cannot be used ({type(error).__name__}: {error}); check "
            f"{ENDPOINT}, AWS_CA_BUNDLE and ~/.aws/config."
        ) from error
    except Exception as error:
        raise explain(error, "The S3 settings") from error
    try:
        yield client
    finally:
        await settle(context.__aexit__(None, None, None))


async def read_at_most(body: Any, size: int) -> bytes:
    """Read at most `size` bytes of a body, in at most 60 s."""
    content = b""
    try:
        # aiohttp's own timeout does not work after a malformed chunk.
        async with asyncio.timeout(2 * READ_TIMEOUT):
            while len(content) < size and (more := await body.read(1 << 16)):
                content += more
    except TimeoutError:
        raise TimeoutError(f"received only {len(content)} bytes in {2 * READ_TIMEOUT} s") from None
    return content


def _own_credentials() -> dict[str, str]:
    """Return the credentials in the synchronous `smolvm` package's variables; {} if unset."""
    key, secret = os.environ.get(KEY_ID, ""), os.environ.get(SECRET, "")
    if bool(key) != bool(secret):
        missing = SECRET if key else KEY_ID
        raise ConfigError(f"{missing} is not set: set {KEY_ID} and {SECRET}, or neither.")
    return {"aws_access_key_id": key, "aws_secret_access_key": secret} if key else {}


def _create(options: dict[str, Any], hurried: bool) -> tuple[Any, Any]:
    """Create a client in this thread; its first request binds it to an event loop."""
    # Do not collect garbage for the first client, which creates many objects that stay. Objects of
    # later clients become garbage.
    first = _loader.cache_info().currsize == 0
    with no_collection() if first else nullcontext():
        return _create_now(options, hurried)


def _create_now(options: dict[str, Any], hurried: bool) -> tuple[Any, Any]:
    import aioboto3
    import aiofiles  # noqa: F401 (import it now; an import during a download would block the loop)
    from aiobotocore.config import AioConfig
    from botocore.handlers import add_expect_header

    session = aioboto3.Session()
    session._session.register_component("data_loader", _loader())
    region = session.region_name or ("us-east-1" if options["endpoint_url"] else None)
    config = AioConfig(
        connect_timeout=CONNECT_TIMEOUT_HURRIED if hurried else CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT_HURRIED if hurried else READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": 2 if hurried else ATTEMPTS},
        max_pool_connections=CONNECTIONS + 2,
        http_session_cls=_session_class(),
        # The manifest's digests verify the content from any server.
        response_checksum_validation="when_required",
        request_checksum_calculation="when_required",
    )

    async def enter() -> tuple[Any, Any]:
        context = session.client("s3", region_name=region, config=config, **options)
        client = await context.__aenter__()
        # aiohttp waits without a deadline for the answer to `Expect: 100-continue`.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        try:
            # Load endpoint rules and signer now; the first request would load them in the loop.
            await client.generate_presigned_url("get_object", {"Bucket": "none", "Key": "none"})
        except BaseException:
            await context.__aexit__(None, None, None)
            raise
        return context, client

    return asyncio.run(enter())


@functools.cache
def _loader() -> Any:
    """Return the loader of botocore's models, which the process shares: the models take 10 MB."""
    from botocore.loaders import JSONFileLoader, Loader

    def in_order(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # This Python function lets other threads run between two JSON objects. The garbage
        # collector stops all threads; dicts give it fewer objects to visit than OrderedDicts, which
        # botocore uses.
        return dict(pairs)

    class CooperativeLoader(JSONFileLoader):  # type: ignore[misc]
        def _load_file(self, full_path: str, open_method: Any) -> Any:
            if not os.path.isfile(full_path):
                return None
            with open_method(full_path, "rb") as file:
                return json.loads(file.read().decode(), object_pairs_hook=in_order)

    loader = Loader()
    loader.file_loader = CooperativeLoader()
    return loader


def _private_socket(address: tuple[Any, ...]) -> socket.socket:
    """Make a socket for an address of `getaddrinfo()`."""
    made = socket.socket(*address[:3])
    private(made.fileno())
    # aiohttp has no deadline for a server that does not read what is sent; the kernel has this one.
    unread = round(READ_TIMEOUT * 1000)  # milliseconds
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread)
    return made


@functools.cache
def _session_class() -> type[Any]:
    """Return a subclass of aiobotocore's HTTP session.

    A session loads the certificates when it is created, which happens in a thread. It reads at most
    `MAX_ERROR_BODY` bytes of an error's body. Forked children do not keep its connections.
    """
    import aiohttp
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.httpsession import create_urllib3_context, get_cert_path

    class Session(AIOHTTPSession):  # type: ignore[misc]
        def __init__(self, verify: Any = True, *args: Any, **options: Any) -> None:
            super().__init__(verify, *args, **options)
            self._connector_args: dict[str, Any] = {
                **self._connector_args,
                "socket_factory": _private_socket,
            }
            self._prepared: ssl.SSLContext | None = None
            if verify:
                self._prepared = create_urllib3_context()
                self._prepared.load_verify_locations(get_cert_path(verify))

        async def send(self, request: Any) -> Any:
            response = await super().send(request)
            if response.status_code >= 300 and response._content is None:
                response._content = await read_at_most(response.raw.content, MAX_ERROR_BODY)
                response.raw.release()
            return response

        def _create_connector(self, proxy_url: str | None) -> Any:
            if proxy_url or self._cert_file:
                return super()._create_connector(proxy_url)
            return aiohttp.TCPConnector(
                limit=self._max_pool_connections,
                ssl=self._prepared or False,
                **self._connector_args,
            )

    return Session
