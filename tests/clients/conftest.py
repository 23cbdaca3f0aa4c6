"""Each test gets its own weir and its own gateway, so no test sees what another left behind."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from browser import Browser, running_browser
from gateway import Gateway, running_gateway
from harness import Simulator, Weir, running_simulator, running_weir


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test starts, ended in reverse order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def gateway(stack: ExitStack) -> Gateway:
    """A gateway that does what the test says."""
    return stack.enter_context(running_gateway())


@pytest.fixture
def start_simulator(stack: ExitStack) -> Callable[..., Simulator]:
    """Starts `weir simulate` with these arguments."""
    return lambda *arguments: stack.enter_context(running_simulator(*arguments))


@pytest.fixture
def start_weir(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weir]:
    """Starts `weir serve` before that gateway, with this config on top of the tests' own."""

    def start(before: Gateway | Simulator, config: str = "") -> Weir:
        directory: Path = tmp_path_factory.mktemp("weir")
        return stack.enter_context(running_weir(directory, before.base_url, config))

    return start


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    """Starting one takes seconds; each test has it with nothing remembered."""
    with running_browser() as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Browser) -> Browser:
    one_browser.forget()
    return one_browser
