"""The base class of every block of a config, and the type of its seeds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from smoa_lab.basics.names import nearest

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A block of a config: unknown keys are errors, values never change. Errors name the nearest key or value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _worded(cls, values: Any, validate: Any) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            problems: list[InitErrorDetails] = [
                {
                    "type": PydanticCustomError("worded", cls._wording(dict(problem))),
                    "loc": problem["loc"],
                    "input": problem["input"],
                }
                for problem in error.errors()
            ]
            raise ValidationError.from_exception_data(error.title, problems) from None

    @classmethod
    def _wording(cls, problem: dict[str, Any]) -> str:
        """What is wrong with a key of this block; a block within has worded its problems already."""
        kind, got, rule = problem["type"], problem["input"], str(problem["msg"]).removeprefix("Input ")
        if kind == "worded" or (kind == "value_error" and isinstance(got, dict)):
            return rule.removeprefix("Value error, ")
        if kind == "extra_forbidden":
            return f"unknown key{nearest(str(problem['loc'][-1]), cls.model_fields)}"
        if kind == "missing":
            return "is missing"
        choices = str(problem["ctx"]["expected"]).replace(" or ", ",").split(",") if kind == "literal_error" else []
        hint = nearest(str(got), [choice.strip(" '") for choice in choices])
        return f"{rule.removeprefix('Value error, ')}; got {got!r}{hint}"
