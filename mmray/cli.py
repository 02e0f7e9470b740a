"""What all jobs share at their edge: options made of config fields, `--config`, exit statuses.

Heavy imports stay inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from mmray.errors import ConfigError, RedactingFormatter, find_error, one_line, redact
from mmray.recipes import read_recipe

EXIT_BAD_RESULT = 1
EXIT_INTERRUPTED = 3
VERBOSE = "mmray.verbose"
ONE_NOTICE_S = 2.0
"""Schedulers may tell a job and all that stands around it, which tells the job again: one notice, not two."""


def options(*kinds: type, only: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for each field of the config classes, in their order; or for some alone."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for kind in reversed(kinds):
            hints = typing.get_type_hints(kind)
            for field in reversed(dataclasses.fields(kind)):
                if not only or field.name in only:
                    command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    kind = next((t for t in typing.get_args(hint) if t is not types.NoneType), hint)
    if choices := field.metadata["choices"]:
        kind = click.Choice(choices)
    settings: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
    if kind is bool:
        settings |= {} if "/" in flag else {"is_flag": True}
    else:
        settings |= {"type": kind, "multiple": typing.get_origin(hint) is tuple}
        settings["show_default"] = field.default not in (None, ()) and "[default" not in settings["help"]
    return click.option(flag, field.name, **settings)


def job(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a job: a click command with `--config`, `--verbose`, one-line errors, exit statuses."""

    def decorate(function: Callable[..., None]) -> click.Command:
        recipe = click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_read_recipe,
            help="YAML file that gives any of the options; flags override it.",
        )
        verbose = click.option(
            "--verbose",
            is_flag=True,
            expose_value=False,
            callback=_note_verbose,
            help="Show what Ray says, too, and where an error comes from.",
        )
        command = recipe(verbose(at_edge(function)))
        return click.command(name, context_settings={"max_content_width": 110})(command)

    return decorate


def _note_verbose(context: click.Context, parameter: click.Parameter, verbose: bool) -> None:
    context.meta[VERBOSE] = verbose


def _read_recipe(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    try:
        recipe = read_recipe(path)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    known: dict[str, click.Parameter] = {}
    for option in context.command.params:
        for flag in (*option.opts, option.name or "") if option.expose_value else ():
            known[flag.lstrip("-").replace("-", "_")] = option
    unknown = [key for key in recipe if key.replace("-", "_") not in known]
    if unknown:
        raise click.BadParameter(f"{path}: no such option: {', '.join(unknown)}; see --help")
    context.default_map = {}
    for key, value in recipe.items():
        option = known[key.replace("-", "_")]
        several = isinstance(option, click.Option) and option.multiple
        values = value if several and isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in values):
            raise click.BadParameter(f"{path}: {key} must be one value, not a list or a mapping")
        context.default_map[option.name] = values if several else value


def at_edge(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into one line on stderr and the exit status that schedulers act on.

    0 done; 1 the result is bad; 2 wrong use or unusable input; 3 interrupted or the infrastructure failed,
    where the same command resumes.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        set_up_logging()
        try:
            _check_stores(kwargs)
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _leave("interrupted; the same command resumes", EXIT_INTERRUPTED)
        except click.exceptions.Exit:
            raise
        except click.ClickException:
            raise
        except Exception as error:
            logging.getLogger("mmray").debug("the job failed", exc_info=error)
            if known := find_error(error):
                _leave(str(known), known.exit_status)
            brief = one_line(f"{type(error).__name__}: {error}", 600)
            _leave(f"{brief} (the same command resumes; --verbose shows where)", EXIT_INTERRUPTED)

    return run


def _check_stores(options: dict[str, Any]) -> None:
    """Meet the store of each URI before Ray starts, so that a wrong one is told at once and as the user's."""
    for name, value in options.items():
        if name.endswith("_uri") and "://" in (value or ""):
            from mmray.storage import Folder

            Folder(value).check()


def _leave(message: str, status: int) -> None:
    click.echo(f"mmray: {redact(message)}", err=True)
    sys.exit(status)


def is_verbose() -> bool:
    """Tell whether the job was told to be verbose."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(VERBOSE))


def set_up_logging() -> None:
    """Write this package's log to stderr, without credentials; all of it if the job is to be verbose."""
    # Never DEBUG for all: botocore would log the requests that it signs, session tokens and all.
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("mmray").setLevel(logging.DEBUG if is_verbose() else logging.INFO)


@contextmanager
def cluster() -> Iterator[None]:
    """Join the Ray cluster that the environment names, or start one on this machine; quiet either way.

    Without a cluster, the local one ends with the job.

    Raises:
        ConfigError: the environment names a job server instead.
        ClusterError: the cluster that it names is not there.
    """
    from mmray.joining import join_cluster

    quiet = not is_verbose()
    started_here = join_cluster(quiet=quiet)
    import ray

    if started_here:
        # ray.init() set its own, which exits with the signal's number
        signal.signal(signal.SIGTERM, _interrupting())
    if quiet:
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is told at the edge, in a line
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def _interrupting() -> Callable[[int, object], None]:
    """Give a handler that ends the job; a scheduler may tell each process of a job, and so this one twice."""
    told: list[float] = []

    def interrupt(number: int, frame: object) -> None:
        told.append(time.monotonic())
        if len(told) == 1 or told[-1] - told[-2] > ONE_NOTICE_S:
            raise KeyboardInterrupt

    return interrupt
