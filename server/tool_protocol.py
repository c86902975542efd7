"""What clients may say about tools and about the form of an answer. Shapes only; see tools.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..runtime.grammar import Grammar, GrammarCompiler
from .protocol import NEUTRAL, Body
from .tools import MAX_TOOLS, Tool, ToolChoice

FunctionType = Annotated[Literal["function"], NEUTRAL]


class FunctionBody(Body):
    """A function that may be called. Without `strict`, keywords that cannot be kept are ignored."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool | None = None


class ToolBody(Body):
    """A tool; functions are the only kind."""

    type: FunctionType
    function: FunctionBody

    def tool(self) -> Tool:
        """The tool as the server knows it.

        Raises:
            RequestError: its name or its parameters are no such thing.
        """
        told = self.function
        return Tool(told.name, told.description, told.parameters, bool(told.strict))


class FunctionName(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """This one must be called; or, in a list, may be."""

    type: FunctionType
    function: FunctionName

    def choice(self) -> ToolChoice:
        """The choice of this tool alone."""
        return ToolChoice("required", (self.function.name,))


class AllowedNames(Body):
    """Some of the tools, of which one may (auto) or must (required) be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(Body):
    """Only some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    def choice(self) -> ToolChoice:
        """The choice among these tools."""
        names = tuple(tool.function.name for tool in self.allowed_tools.tools)
        return ToolChoice(self.allowed_tools.mode, names)


def _choice_shape(value: Any) -> str:
    if not isinstance(value, dict):
        return "<mode>"
    return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"


ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(_choice_shape),
]


def tool_choice(body: str | NamedTool | AllowedTools | None) -> ToolChoice | None:
    """A `ToolChoiceBody` as the server knows it."""
    match body:
        case NamedTool() | AllowedTools():
            return body.choice()
        case "none" | "auto" | "required":
            return ToolChoice(body)
    return None


class CalledFunction(Body):
    """What an assistant called, and with what; a text, since it may be anything."""

    name: str
    arguments: str


class ToolCallBody(Body):
    """A call in an earlier turn of the assistant."""

    id: str
    type: FunctionType
    function: CalledFunction


class Turn(Body):
    """What tools add to a message: an assistant's calls, and whose result a tool's message is."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    tool_call_id: str | None = None
    tool_calls: (
        Annotated[list[ToolCallBody], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]
        | None
    ) = None

    @field_validator("tool_calls")
    @classmethod
    def _only_assistants_call(
        cls, value: list[ToolCallBody] | None, info: ValidationInfo
    ) -> list[ToolCallBody] | None:
        if value is not None and info.data.get("role") != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant calls tools")
        return value


class TextFormat(Body):
    """The answer is text."""

    type: Annotated[Literal["text"], NEUTRAL]

    def grammar(self, _: GrammarCompiler) -> Grammar | None:
        """None: anything will do."""
        return None


class ObjectFormat(Body):
    """The answer is a JSON object."""

    type: Literal["json_object"]

    def grammar(self, compiler: GrammarCompiler) -> Grammar | None:
        """Any object."""
        return compiler.json_object()


class NamedSchema(Body):
    """A JSON schema. Without `strict`, keywords that cannot be kept are ignored."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Neither used nor kept.")
    description: str | None = Field(None, description="Neither used nor kept.")
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """The answer is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def grammar(self, compiler: GrammarCompiler) -> Grammar | None:
        """What the schema allows.

        Raises:
            RequestError: it is no usable schema.
        """
        return compiler.json_schema(self.json_schema.json_schema, bool(self.json_schema.strict))


def _format_shape(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return {"json_object": "<object>", "json_schema": "<schema>"}.get(str(kind), "<text>")


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<object>")]
    | Annotated[SchemaFormat, Tag("<schema>")],
    Discriminator(_format_shape),
]
