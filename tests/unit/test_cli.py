"""The edge of every job: options made of fields, recipes, one-line errors, exit statuses, `--help`."""

import ast
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mmray.cli import VERBOSE, at_edge, cluster, job, options
from mmray.errors import BudgetError, ClusterError, ConfigError, DataError, MmrayError, find_error
from mmray.options import option

REPOSITORY = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (REPOSITORY / "jobs").glob("*.py"))


@dataclass(frozen=True)
class Oven:
    """Fields of every kind."""

    heat: int = option(180, "Degrees.")
    hours: float = option(1.5, "How long.")
    kind: str = option("air", "How it heats.", choices=("air", "grill"))
    dish: str = option("tin", "What stands in it.", flag="--dish-name")
    light: bool = option(True, "Let there be light.", flag="--light/--no-light")
    racks: str | None = option(None, "Racks, N or MIN:MAX.")
    fan: bool | None = option(None, "Turn the fan.", flag="--fan/--no-fan")
    limit: int | None = option(None, "Stop after N.")


@dataclass(frozen=True)
class Baker:
    """A second concern."""

    first_name: str = option("Ada", "Who bakes.")


@job("bake")
@click.option("--bread", required=True)
@options(Oven, Baker)
def bake(bread, **settings):
    """Bake."""
    click.echo(repr({"bread": bread, **settings}))


def invoke(*arguments):
    return CliRunner().invoke(bake, arguments)


def baked(*arguments):
    """Run the command, and give what it saw."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return ast.literal_eval(result.stdout)


def refusal(*arguments):
    """Run a command that fails, and give the one line that says why."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    usage, _, message = result.stderr.partition("Error: ")
    assert "bake" in usage and len(message.splitlines()) == 1
    return message


@pytest.fixture
def recipe(tmp_path):
    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_fields_are_the_options_and_their_defaults():
    assert baked("--bread", "rye") == {"bread": "rye", **asdict(Oven()), **asdict(Baker())}


def test_flags_give_values_of_the_fields_types():
    given = baked(
        *("--bread", "rye", "--heat", "200", "--hours", "2", "--kind", "grill", "--dish-name", "pan"),
        *("--no-light", "--fan", "--racks", "1:4", "--limit", "7", "--first-name", "Bo"),
    )
    oven = Oven(200, 2.0, "grill", "pan", False, "1:4", True, 7)
    assert given == {"bread": "rye", **asdict(oven), "first_name": "Bo"}
    assert all(type(given[name]) is type(value) for name, value in asdict(oven).items())


def test_help_names_every_option_in_the_fields_order_with_default_and_choices():
    text = invoke("--help").stdout
    flags = [
        "--bread",
        "--heat",
        "--hours",
        "--kind",
        "--dish-name",
        "--light",
        "--racks",
        "--fan",
        "--limit",
    ]
    places = [text.index(f"  {flag}") for flag in [*flags, "--first-name"]]
    assert places == sorted(places)
    for part in ("Degrees.", "[default: 180]", "[air|grill]", "--light / --no-light", "[required]"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--heat", "hot"], "hot"), (["--kind", "steam"], "steam"), (["--limit", "1.5"], "1.5")],
)
def test_a_value_of_another_type_is_refused_by_option_and_value(arguments, named):
    message = refusal("--bread", "rye", *arguments)
    assert named in message and arguments[0] in message


def test_a_recipe_gives_any_option_however_its_name_is_written(recipe):
    path = recipe(
        "bread: rye\nheat: 220\ndish-name: pan\nfirst_name: Bo\nlight: false\nfan: true\nhours: 5e-1\n"
    )
    given = baked("--config", path)
    assert given == {
        "bread": "rye",
        **asdict(Oven(heat=220, hours=0.5, dish="pan", light=False, fan=True)),
        "first_name": "Bo",
    }
    assert baked("--config", recipe("bread: rye\ndish: pan\nfirst-name: Bo")) | {"fan": True} == baked(
        "--bread", "rye", "--dish-name", "pan", "--first-name", "Bo", "--fan"
    )


def test_flags_override_a_recipe_wherever_they_stand(recipe):
    path = recipe("bread: rye\nheat: 220\nlight: false\n")
    for arguments in (
        ["--config", path, "--heat", "90", "--light"],
        ["--heat", "90", "--light", "--config", path],
    ):
        given = baked(*arguments)
        assert given["heat"] == 90 and given["light"] is True and given["bread"] == "rye"


@pytest.mark.parametrize("written", ["1:4", "'1:4'", "1:30"])
def test_a_range_in_a_recipe_is_not_read_as_a_number_in_base_60(recipe, written):
    assert baked("--config", recipe(f"bread: rye\nracks: {written}"))["racks"] == written.strip("'")


@pytest.mark.parametrize("nothing", ["", "null", "~"])
def test_a_recipe_value_of_nothing_leaves_the_default(recipe, nothing):
    assert baked("--bread", "rye", "--config", recipe(f"limit: {nothing}\nheat: {nothing}")) == baked(
        "--bread", "rye"
    )


def test_an_empty_recipe_changes_nothing(recipe):
    assert baked("--bread", "rye", "--config", recipe("# nothing yet\n")) == baked("--bread", "rye")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("heat: 1\nheta: 2\nsugar: 3", "heta, sugar"),
        ("no-light: true", "no-light"),  # read as light: true, it would say the opposite
        ("config: other.yaml", "config"),
        ("1: 2", "1"),
        ("heat: [1, 2]", "heat"),
        ("racks: {low: 1}", "racks"),
        ("fan: maybe", "maybe"),
        ("kind: steam", "steam"),
        ("- heat\n- 1", "recipe.yaml"),
        ("just words", "recipe.yaml"),
        ("heat: [1", "not YAML"),
        ("heat: @1", "not YAML"),
        (b"PAR1\x00\xff\xfe", "not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(recipe, content, named):
    assert named in refusal("--bread", "rye", "--config", recipe(content))


def test_a_recipe_that_is_not_there_is_refused_by_path(tmp_path):
    assert "nowhere.yaml" in refusal("--bread", "rye", "--config", str(tmp_path / "nowhere.yaml"))
    assert str(tmp_path) in refusal("--bread", "rye", "--config", str(tmp_path))


def edge(error):
    """Run a job that raises the error."""

    @job("fail")
    def fail():
        raise error

    return CliRunner().invoke(fail, [])


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("--heat 9 is cold"), 2), (DataError("no rows in x"), 2), (BudgetError("3 of 9 failed"), 1)],
)
def test_a_users_error_is_its_own_line_and_exit_status(error, status):
    result = edge(error)
    assert result.exit_code == status == error.exit_status
    assert result.stderr == f"mmray: {error}\n" and result.stdout == ""


def test_an_unexpected_error_is_one_line_that_says_how_to_go_on():
    result = edge(RuntimeError("disk\n  on fire " + "x" * 5000))
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert "RuntimeError: disk on fire" in line and "resumes" in line and len(line) < 1000


@pytest.mark.parametrize("kind", [RuntimeError, DataError])
def test_no_line_at_the_edge_holds_a_secret(kind, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    result = edge(kind("GET http://store/?X-Amz-Signature=abcdef with swordfish"))
    assert "GET" in result.stderr and "abcdef" not in result.output and "swordfish" not in result.output


@pytest.fixture
def outside(monkeypatch):
    """Be a process that has joined no cluster, whatever ran before."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.usefixtures("outside")
def test_the_address_of_a_job_server_is_no_place_to_run(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=http://head:8265 .*ray job submit"), cluster():
        pytest.fail("it ran")


@pytest.fixture
def deserted():
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.usefixtures("outside")
def test_a_cluster_that_is_gone_is_not_waited_for(deserted, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", deserted)
    with (
        pytest.raises(ClusterError, match=rf"^RAY_ADDRESS: no Ray cluster answers at {deserted} "),
        cluster(),
    ):
        pytest.fail("it ran")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"{deserted}\n")  # as a crash leaves it behind
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ClusterError, match=r"ray/ray_current_cluster: no Ray .*RAY_ADDRESS=local"), cluster():
        pytest.fail("it ran")


def test_an_interrupted_job_says_that_it_resumes():
    result = edge(KeyboardInterrupt())
    assert result.exit_code == 3
    assert result.stderr.splitlines() == ["mmray: interrupted; the same command resumes"]


@pytest.mark.parametrize(("error", "status"), [(SystemExit(1), 1), (click.UsageError("give one"), 2)])
def test_what_already_carries_an_exit_status_keeps_it(error, status):
    result = edge(error)
    assert result.exit_code == status and "mmray:" not in result.stderr


def test_the_edge_hands_arguments_through():
    seen = []
    at_edge(lambda *args, **kwargs: seen.append((args, kwargs)))(1, two=2)
    assert seen == [((1,), {"two": 2})]


class Wrapper(Exception):
    """Wraps an error as Ray does."""

    def __init__(self, cause=None, worker_failures=None):
        super().__init__("a traceback\nof many lines")
        self.cause, self.worker_failures = cause, worker_failures


class TaskDataError(Wrapper, DataError):
    """An error that is a DataError and wraps one, as `RayTaskError(DataError)` does."""


def raised_from(cause):
    try:
        raise RuntimeError("outer") from cause
    except RuntimeError as error:
        return error


def raised_while_handling(context):
    try:
        try:
            raise context
        except MmrayError:
            raise RuntimeError("outer")  # noqa: B904
    except RuntimeError as error:
        return error


USERS = DataError("row 7 of x.parquet")


@pytest.mark.parametrize(
    "error",
    [
        USERS,
        raised_from(USERS),
        raised_while_handling(USERS),
        Wrapper(USERS),
        Wrapper(raised_from(Wrapper(USERS))),
        TaskDataError(USERS),
        Wrapper(worker_failures={0: Wrapper(None), 1: Wrapper(TaskDataError(USERS))}),
    ],
)
def test_the_users_error_is_found_inside_what_wraps_it(error):
    assert find_error(error) is USERS
    result = edge(error)
    assert (result.exit_code, result.stderr) == (2, f"mmray: {USERS}\n")


def test_where_no_users_error_is_wrapped_none_is_found_even_in_a_circle():
    error = Wrapper(ValueError("no"))
    error.__cause__ = error.cause
    error.cause.__context__ = error
    assert find_error(error) is None


@job("whisper")
def whisper():
    """Tell whether to be verbose."""
    click.echo(click.get_current_context().meta[VERBOSE])


@pytest.mark.parametrize(("arguments", "told"), [([], "False"), (["--verbose"], "True")])
def test_a_job_knows_whether_it_was_told_to_be_verbose(arguments, told):
    assert CliRunner().invoke(whisper, arguments).output == f"{told}\n"


@pytest.mark.parametrize("error", [USERS, RuntimeError("odd")])
def test_told_to_be_verbose_a_job_shows_where_its_error_comes_from(error):
    code = f"""
from mmray.cli import job
from mmray.errors import DataError

@job("fail")
def fail():
    raise {error!r}

fail()
"""
    quiet, verbose = (
        subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, cwd=REPOSITORY)
        for more in ([], ["--verbose"])
    )
    assert "Traceback" not in quiet.stderr and "Traceback" in verbose.stderr
    assert quiet.returncode == verbose.returncode == (2 if error is USERS else 3)
    assert quiet.stderr.splitlines() == verbose.stderr.splitlines()[-1:]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_helps_at_once_on_one_screen_with_an_example(name):
    environment = os.environ | {"COLUMNS": "120"}
    help_of = [sys.executable, "-X", "importtime", f"jobs/{name}", "--help"]
    ran = subprocess.run(
        help_of, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.splitlines()) <= 60
    assert f"Example: {name} " in ran.stdout
    modules = set(re.findall(r"^import time:.*\|\s+(\S+)$", ran.stderr, re.MULTILINE))
    assert "mmray.cli" in modules
    assert not modules & {"torch", "ray", "timm", "transformers"}
