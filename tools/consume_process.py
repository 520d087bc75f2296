"""One consumer process of ``shmbroker consume``: find the listener, consume until told to leave."""

from __future__ import annotations

import importlib
import json
import logging
import operator
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import shmbroker
from shmbroker.errors import BadRequest, ShmBrokerError
from shmbroker.tools.exit_codes import ExitCode, exit_code, remedy
from shmbroker.tools.expressions import from_json

if TYPE_CHECKING:
    from shmbroker import PushConsumer

log = logging.getLogger("shmbroker.consume")


def main() -> NoReturn:
    """Entry point. Threads that are still in a listener at the end must not hold the process up."""
    code = _main(json.loads(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(wanted: dict[str, Any]) -> int:
    leaving = _Leaving()
    signal.signal(signal.SIGTERM, leaving.tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the fleet's affair
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    threading.Thread(target=_leave_with, args=(wanted["fleet"],), name="watch-fleet", daemon=True).start()
    try:
        sys.path.insert(0, wanted["app_dir"])
        listener = find_listener(wanted["listener"])
        with shmbroker.open(wanted["directory"]) as broker:
            subscriptions = {topic: from_json(of_topic) for topic, of_topic in wanted["subscriptions"].items()}
            consumer = broker.push_consumer(wanted["group"], listener, subscriptions, **wanted["settings"])
            leaving.watch(consumer)
            return ExitCode.OK if consumer.run() else ExitCode.FINDING
    except (ShmBrokerError, OSError) as error:
        hint = remedy(error)
        log.error("%s: %s%s", type(error).__name__, error, f" ({hint})" if hint else "")  # noqa: TRY400 - for people
        return exit_code(error)
    except Exception:
        log.exception("a fault of shmbroker; please report it")
        return ExitCode.INTERNAL


class _Leaving:
    """SIGTERM before there is a consumer that knows what to do."""

    def __init__(self) -> None:
        self._told = False
        self._consumer: PushConsumer | None = None

    def tell(self, _signum: int, _frame: FrameType | None) -> None:
        self._told = True
        if self._consumer is not None:
            self._consumer.stop()

    def watch(self, consumer: PushConsumer) -> None:
        self._consumer = consumer
        if self._told:
            consumer.stop()


def _leave_with(fleet: int) -> None:
    """Whoever started us was killed, perhaps before we came here: nobody would tell us to leave any more."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(fleet)
        if os.getppid() == fleet:
            select.select([pidfd], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def find_listener(name: str) -> Callable[..., Any]:
    """The callable that ``package.module:name`` means. Raises BadRequest that says which part of it is wrong."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise BadRequest(f"listener {name!r}: expected MODULE:LISTENER, as in orders:handle")
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            log.exception("importing %s", module)
        if module.endswith(".py"):
            *place, stem = module.removesuffix(".py").split("/")
            where = f" --app-dir {'/'.join(place) or '/'}" if place else ""
            raise BadRequest(f"listener {name!r}: names a file, not a module: {stem}:{attribute}{where}") from error
        raise BadRequest(f"listener {name!r}: {error}; --app-dir says where its module is") from error
    except AttributeError as error:
        raise BadRequest(f"listener {name!r}: {error}") from error
    except Exception as error:
        log.exception("importing %s", module)
        raise BadRequest(f"listener {name!r}: importing it failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise BadRequest(f"listener {name!r} is {found!r}, and not callable")
    return found  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
