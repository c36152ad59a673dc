"""Turn errors of botocore and aiohttp into messages that tell the user what to do.

Error classes are compared by name, so that neither library is imported before it is needed.
"""

from __future__ import annotations

from typing import Any

from smolvm_async.errors import ImageError, SmolVMError

CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role, as for boto3"
)
BY_CODE = {
    "NoSuchBucket": "the bucket does not exist; check its name. If it is not on AWS, also check "
    "SMOLVM_S3_ENDPOINT_URL",
    "NoSuchKey": "the object does not exist; check the URI (a manifest is named smolvm-image.json)",
    "404": "the object does not exist; check the URI (a manifest is named smolvm-image.json)",
    "AccessDenied": "access is denied; give these credentials s3:GetObject (s3:PutObject to push), "
    "and s3:ListBucket: without s3:ListBucket, S3 also reports a missing object as forbidden",
    "AllAccessDisabled": "access to the bucket or object is disabled; ask its owner",
    "InvalidAccessKeyId": f"the server does not know the access key; {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not match the access key; {CREDENTIALS}",
    "ExpiredToken": "the credentials have expired; renew them (aws sso login, or a new token)",
    "RequestTimeTooSkewed": "this host's clock is wrong; correct it",
    "InvalidObjectState": "the object is archived (Glacier); restore the object first",
    "PreconditionFailed": "the object was changed during the download; try again",
    "412": "the object was changed during the download; try again",
    "InvalidRange": "the object is shorter than its manifest says; publish the image again",
    "416": "the object is shorter than its manifest says; publish the image again",
    "InvalidBucketName": "the bucket's name is not valid; check the URI",
    "NoSuchUpload": "another process aborted the upload; try again",
    "EntityTooLarge": "the object is too large for the server; compress it or make it smaller",
}
BY_CODE |= {
    "403": BY_CODE["AccessDenied"],
    "Forbidden": BY_CODE["AccessDenied"],
    "InvalidToken": BY_CODE["ExpiredToken"],
    "TokenRefreshRequired": BY_CODE["ExpiredToken"],
    "NotFound": BY_CODE["404"],
}
REGION = {
    *("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    "301",
}
THROTTLED = {"SlowDown", "503", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "429"}
UNREACHABLE = (
    *("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"),
    *("ConnectionClosedError", "ReadTimeoutError", "HTTPClientError"),
    *("aiohttp.ClientError", "TimeoutError"),
)
BROKEN = ("aiohttp.ClientPayloadError", "ResponseStreamingError", "IncompleteReadError")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")


def explain(error: Exception, subject: str) -> Exception:
    """Return an `ImageError` that explains an error of the client; return other errors unchanged.

    The message begins with `subject`, such as the URI.
    """
    if isinstance(error, SmolVMError):
        return error
    explanation = _explanation(error)
    return error if explanation is None else ImageError(f"{subject}: {explanation}.")


def is_offline(error: BaseException | None) -> bool:
    """Return whether the server could not be reached, so that a cached image may be used."""
    while error is not None and not _kinds(error) & {*UNREACHABLE, *NO_CREDENTIALS, "SSLError"}:
        error = error.__cause__
    return error is not None


def is_temporary(error: Exception) -> bool:
    """Return whether the same request may succeed if it is repeated a little later."""
    if _kinds(error) & set(UNREACHABLE):
        return True
    metadata = getattr(error, "response", {}).get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    return isinstance(status, int) and (status >= 500 or status in (408, 429))


def _kinds(error: BaseException) -> set[str]:
    """Return the names of an error's classes; aiohttp and botocore share some names."""
    return {
        f"aiohttp.{kind.__name__}" if kind.__module__.startswith("aiohttp") else kind.__name__
        for kind in type(error).__mro__
    }


def _explanation(error: Exception) -> str | None:
    kinds = _kinds(error)
    if "ClientError" in kinds:
        return _of_response(getattr(error, "response", {}))
    if kinds & set(NO_CREDENTIALS):
        return f"there are no credentials ({error}); {CREDENTIALS}"
    if "ProfileNotFound" in kinds:
        return f"{error}; check AWS_PROFILE and ~/.aws/config"
    if "SSLError" in kinds:
        return (
            f"the endpoint's certificate is not trusted ({error}); set AWS_CA_BUNDLE to a file "
            "with its CA certificate"
        )
    if kinds & set(BROKEN) or type(error) is TimeoutError:
        return f"the server's answer was cut off ({error}); try again"
    if kinds & set(UNREACHABLE):
        return (
            f"the endpoint cannot be reached ({error}); check the network, AWS_REGION and "
            "SMOLVM_S3_ENDPOINT_URL"
        )
    if isinstance(error, RecursionError):  # botocore follows every redirection
        return "the server redirects endlessly between regions; set AWS_REGION"
    if "BotoCoreError" in kinds:
        return f"this configuration does not work ({error}); check SMOLVM_S3_ENDPOINT_URL and AWS_*"
    if isinstance(error, ValueError | LookupError | TypeError):  # for a malformed answer
        return f"the server's answer cannot be used ({type(error).__name__}: {error})"
    return None


def _of_response(response: dict[str, Any]) -> str:
    """Return an explanation of an error that the server sent."""
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    status = str(metadata.get("HTTPStatusCode", ""))
    code, message = str(error.get("Code", "")), str(error.get("Message", ""))[:300]
    if code in REGION or status == "301":
        region = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region")
        region = region or error.get("Endpoint") or "another region"
        return (
            f"the bucket is in {region}; set AWS_REGION (or region in ~/.aws/config) to the "
            "bucket's region"
        )
    if code in THROTTLED or status in THROTTLED:
        tries = metadata.get("RetryAttempts", 0) + 1
        return f"the server is too busy ({code or status}) after {tries} tries; try again later"
    sentence = BY_CODE.get(code) or BY_CODE.get(status)
    return sentence or f"the server refused the request ({code or status}: {message})"
