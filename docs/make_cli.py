"""Writes docs/cli.md from the commands' own help. ``make docs`` runs it; a test checks that the page is up to date."""

from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    """The page's text."""
    from onceover.cli import cli

    width = {"terminal_width": 100, "max_content_width": 100, "help_option_names": ["-h", "--help"]}
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n"]
    main = click.Context(cli, info_name="onceover", **width)
    parts.append(f"```\n{cli.get_help(main)}\n```\n")
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, info_name=name, parent=main, **width)
        parts.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(render(), encoding="utf-8")
