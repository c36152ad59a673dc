"""The base class of the arguments that are models."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from smolvm_async.config.checks import shown
from smolvm_async.errors import ConfigError


class StrictModel(BaseModel):
    """A frozen, strict model, which raises pydantic's first validation error as a `ConfigError`."""

    # Validators that no VM of this process needs yet are not built: an import is to be quick.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)
    argument: ClassVar[str] = ""  # the argument of `AsyncSmolVM`, for messages
    example: ClassVar[str] = ""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{self.argument}{name}={shown(first['input'])} is wrong: {first['msg']}."
            ) from None
