"""A family of commands that says what a mistyped one was probably meant to be."""

from __future__ import annotations

import click


class CommandGroup(click.Group):
    """As click's, which does this only from 8.4 on, and not for commands that are loaded when they are used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            from difflib import get_close_matches

            nearest = get_close_matches(name, self.list_commands(ctx), n=1)
            meant = f"Did you mean {nearest[0]!r}?" if nearest else f"`{ctx.command_path} --help` lists them."
            ctx.fail(f"No such command {name!r}. {meant}")
        return super().resolve_command(ctx, args)
