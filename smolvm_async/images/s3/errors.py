"""What botocore's errors mean, each in a sentence that says what to do."""

from __future__ import annotations

from typing import Any

from smolvm_async.errors import ImageError, SmolVMError

CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role, as boto3 has it"
)
BY_CODE = {
    "NoSuchBucket": "there is no such bucket; check its name, and SMOLVM_S3_ENDPOINT_URL if it is "
    "not on AWS",
    "NoSuchKey": "there is no such object; check the URI (a manifest is called smolvm-image.json)",
    "404": "there is no such object; check the URI (a manifest is called smolvm-image.json)",
    "AccessDenied": "access is denied; these credentials need s3:GetObject for it (to push, "
    "s3:PutObject), and s3:ListBucket, or S3 does not tell a missing object from a forbidden one",
    "AllAccessDisabled": "all access to it is disabled; ask its owner",
    "InvalidAccessKeyId": f"the access key is not known there; {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; {CREDENTIALS}",
    "ExpiredToken": "the credentials have expired; renew them (aws sso login, or a new token)",
    "RequestTimeTooSkewed": "this host's clock is wrong; set it",
    "InvalidObjectState": "it is archived (Glacier); restore it first",
    "PreconditionFailed": "it was changed while it was downloaded; try again",
    "412": "it was changed while it was downloaded; try again",
    "InvalidRange": "it is shorter than its manifest says; publish it again",
    "416": "it is shorter than its manifest says; publish it again",
    "InvalidBucketName": "no bucket can have that name",
    "NoSuchUpload": "the upload was ended by somebody else; try again",
    "EntityTooLarge": "it is larger than the store takes",
}
BY_CODE |= {
    "403": BY_CODE["AccessDenied"],
    "Forbidden": BY_CODE["AccessDenied"],
    "InvalidToken": BY_CODE["ExpiredToken"],
    "TokenRefreshRequired": BY_CODE["ExpiredToken"],
    "NotFound": BY_CODE["404"],
}
REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
}
THROTTLED = {"SlowDown", "503", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "429"}
UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "ConnectionClosedError",
    "ReadTimeoutError",
    "HTTPClientError",
    "aiohttp.ClientError",
    "TimeoutError",
)
BROKEN = ("aiohttp.ClientPayloadError", "ResponseStreamingError", "IncompleteReadError")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")


def explained(error: Exception, what: str) -> Exception:
    """The `ImageError` that says what an error of the client means; others as they are.

    Args:
        what: What was asked for: a URI.
    """
    if isinstance(error, SmolVMError):
        return error
    sentence = _sentence(error)  # first: timeouts of botocore's are OSErrors too
    return error if sentence is None else ImageError(f"{what}: {sentence}.")


def is_offline(error: BaseException | None) -> bool:
    """Whether nothing was reached, so that what is cached may stand for it."""
    while error is not None and not _kinds(error) & {*UNREACHABLE, *NO_CREDENTIALS, "SSLError"}:
        error = error.__cause__
    return error is not None


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    if _kinds(error) & set(UNREACHABLE):
        return True
    metadata = getattr(error, "response", {}).get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    return isinstance(status, int) and (status >= 500 or status in (408, 429))


def _kinds(error: BaseException) -> set[str]:
    """The names of an error's classes; aiohttp has some of the same names as botocore."""
    return {
        f"aiohttp.{kind.__name__}" if kind.__module__.startswith("aiohttp") else kind.__name__
        for kind in type(error).__mro__
    }


def _sentence(error: Exception) -> str | None:
    kinds = _kinds(error)
    if "ClientError" in kinds:
        return _answer(getattr(error, "response", {}))
    if kinds & set(NO_CREDENTIALS):
        return f"there are no credentials ({error}); {CREDENTIALS}"
    if "ProfileNotFound" in kinds:
        return f"{error}; check AWS_PROFILE and ~/.aws/config"
    if "SSLError" in kinds:
        return f"the endpoint's certificate is not trusted ({error}); see AWS_CA_BUNDLE"
    if kinds & set(BROKEN) or type(error) is TimeoutError:
        return f"the answer broke off ({error}); try again"
    if kinds & set(UNREACHABLE):
        return (
            f"the endpoint cannot be reached ({error}); check the network, AWS_REGION and "
            "SMOLVM_S3_ENDPOINT_URL"
        )
    if isinstance(error, RecursionError):  # botocore follows each redirection
        return "the server sends from region to region without end; set AWS_REGION"
    if "BotoCoreError" in kinds:
        return f"S3 cannot be used like this ({error}); check SMOLVM_S3_ENDPOINT_URL and AWS_*"
    if isinstance(error, ValueError | LookupError | TypeError):  # of the client, or of ours
        return f"the server's answer cannot be used ({type(error).__name__}: {error})"
    return None


def _answer(response: dict[str, Any]) -> str:
    """What an answer that is an error says."""
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    status = str(metadata.get("HTTPStatusCode", ""))
    code, message = str(error.get("Code", "")), str(error.get("Message", ""))[:300]
    if code in REGION or status == "301":
        region = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region")
        region = region or error.get("Endpoint") or "another region"
        return f"the bucket is in {region}; set AWS_REGION (or region in ~/.aws/config) to that"
    if code in THROTTLED or status in THROTTLED:
        tries = metadata.get("RetryAttempts", 0) + 1
        return f"the server is too busy ({code or status}) after {tries} tries; try again later"
    sentence = BY_CODE.get(code) or BY_CODE.get(status)
    return sentence or f"the server refuses ({code or status}: {message})"
