"""``shmbroker failpoints``: where a test can make a process die."""

from __future__ import annotations

import click

from shmbroker.tools import console
from shmbroker.tools.session import Session, common_options, pass_session


@click.command()
@common_options
@pass_session
def failpoints(session: Session) -> None:
    """List every failpoint, with the state in which a process passes it.

    \b
    shmbroker failpoints
    SHMBROKER_FAILPOINTS='flusher/flusher.after_pwrite=kill@3' shmbroker serve
    SHMBROKER_FAILPOINTS='client/append.copied=kill' shmbroker send --topic t <<< x

    [role/]name=kill|stop|exit|errno:NAME|sleep:MS|torn:BYTES[@pass[+]], several separated by semicolons.
    """
    from shmbroker.failpoint import listing

    if session.json:
        console.print_json([{"name": name, "state": state} for name, state in listing()])
        return
    console.table("", ["failpoint", "state in which it is passed"], listing())
