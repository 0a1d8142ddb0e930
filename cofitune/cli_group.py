"""How the command line shows its flags, and what it answers to an option or a command that there is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

from cofitune.cli_output import OUTPUT, shared_parameters
from cofitune.config.explain import KEY_PLACES
from cofitune.config.hints import option_hint
from cofitune.errors import UserError

if TYPE_CHECKING:  # where the tested version of typer has click's classes; others have them elsewhere
    from typer._click import Command, Context, Parameter


class Commands(TyperGroup):
    """Commands whose flags have no type in the help; `--train.learning_rate 1e-4` is answered with what to type."""

    def __init__(self, **settings: Any) -> None:
        """Give every command the options that all have; hidden ones are typed by this program alone."""
        super().__init__(**settings)
        for command in self.commands.values():
            if not command.hidden and not isinstance(command, TyperGroup):
                command.params += shared_parameters()

    def get_params(self, ctx: Context) -> list[Parameter]:
        """The group's own options, its flags shown without `<bool>`."""
        return [_untyped(parameter) for parameter in super().get_params(ctx)]

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """The command, its flags shown without `<bool>`."""
        command = super().get_command(ctx, cmd_name)
        for parameter in [*command.params, command.get_help_option(ctx)] if command else []:
            if parameter is not None:
                _untyped(parameter)
        return command

    def invoke(self, ctx: Context) -> object:
        """Run the command that is typed.

        Raises:
            UserError: an option is unknown, and is a key of the config or close to another option.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:  # click's own classes lie elsewhere in each of typer's versions
            name = getattr(error, "option_name", None)
            hint = (
                option_hint(name, KEY_PLACES)
                if isinstance(name, str) and type(error).__name__ == "NoSuchOption"
                else None
            )
            if show := getattr(error, "format_message", None):  # the parser's own error, which it shows by itself
                OUTPUT.refuse(show(), ctx.invoked_subcommand or "")
            if hint:
                raise UserError(f"{name}: {hint}") from None
            raise


def _untyped(parameter: Parameter) -> Parameter:
    if getattr(parameter, "is_flag", False) and parameter.metavar is None:
        parameter.metavar = ""
    return parameter
