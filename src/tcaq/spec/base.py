"""The base of all specifications: frozen, closed to unknown fields, and validated with all errors at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from tcaq.errors import UsageError


class Spec(BaseModel):
    """A frozen specification that round-trips JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither

    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields that came later: left out of the JSON while they have their default, so that runs made before them stay the same."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        unused = {name for name in self.LATER if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in fields.items() if name not in unused}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Load from a JSON file. Raises: UsageError naming the file and every wrong field."""
        try:
            return cls.parse(json.loads(path.read_text()), where=str(path))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"cannot read {path} as JSON: {error}") from error

    @classmethod
    def parse(cls, values: Any, where: str) -> Self:
        """Validate plain values. Raises: UsageError listing every wrong field with what was given."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']} (given: {e['input']!r})"
                for e in error.errors(include_url=False)
            ]
            raise UsageError(f"{where}: " + "; ".join(lines)) from error
