"""The status page in a real browser: what it shows, how it looks, and that it keeps to itself."""

import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from browser import Browser
from gateway import Answer, Gateway, completion, error
from harness import QUICK, ROOT, Simulator, Weir, get, wait_until

# Pictures to look at: WEIR_PICTURES=FOLDER tests/run clients.
PICTURES = os.environ.get("WEIR_PICTURES")

SCRIPT_NAME = "<img src=x onerror=\"document.title='taken over'\">"

# Less than is asked for: somebody waits.
TIGHT = """
[models."gpt-4.1-mini"]
requests = { rate = "1200/min", burst = 20 }
concurrency = 9
[models."deepseek-chat"]
concurrency = 1
[clients.batch]
key = "sk-batch"
concurrency = 2
[clients.support-bot]
key = "sk-bot"
weight = 3
[clients.nightly]
key = "sk-nightly"
requests = "60/min"
"""


def post(weir: Weir, model: str, key: str, stream: bool = False) -> int:
    """A chat request, answered in full; its status."""
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{weir.base_url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as answer:
        return answer.code


@contextmanager
def load(weir: Weir, *askers: tuple[str, str, bool]) -> Iterator[None]:
    """Askers that ask again as soon as they are answered, until it is over."""
    over = threading.Event()

    def keep_asking(model: str, key: str, stream: bool) -> None:
        while not over.is_set():
            post(weir, model, key, stream)

    threads = [threading.Thread(target=keep_asking, args=asker) for asker in askers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def busy(weir: Weir):
    """Four times what the limits let through, of three clients."""
    mini, chat = "gpt-4.1-mini", "deepseek-chat"
    batch = [(mini, "sk-batch", True)] * 8
    bot = [(mini, "sk-bot", True)] * 3 + [(chat, "sk-bot", True)] * 3
    nightly = [(mini, "sk-nightly", True), (mini, "sk-nightly", False)]
    return load(weir, *batch, *bot, *nightly)


def status(weir: Weir) -> dict:
    code, text = get(f"{weir.admin_url}/status.json")
    assert code == 200, text
    return json.loads(text)


def picture(browser: Browser, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(PICTURES) / f"{name}.png")


def assert_no_sideways_overflow(browser: Browser, what: str) -> None:
    width, room = browser.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room, f"{what}: {width} px in {room}"


def test_idle_it_says_so_and_its_console_is_silent(gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser):
    weir = start_weir(gateway)
    for scheme in ["light", "dark"]:
        browser.look(1280, 900, scheme)
        browser.open(f"{weir.admin_url}/")
        browser.wait_for("#live", "live")
        assert browser.driver.current_url == f"{weir.admin_url}/status"
        assert "Nobody waits" in browser.text("#headline")
        assert not browser.is_shown("#login") and not browser.is_shown("#offline")
        picture(browser, f"idle-wide-{scheme}")
    assert browser.errors() == []


def test_under_load_it_shows_who_waits_for_whose_limit_and_goes_on_by_itself(
    start_simulator: Callable[..., Simulator], start_weir: Callable[..., Weir], browser: Browser
):
    weir = start_weir(start_simulator("--first-token", "200ms", "--per-token", "10ms"), TIGHT)
    browser.open(f"{weir.admin_url}/status")
    browser.wait_for("#live", "live")
    # The longest that is a name of its own: as an option, nothing can break it.
    assert post(weir, "a" + 199 * "m", "sk-bot") == 200
    with busy(weir):
        # Nothing is loaded anew: the page asks by itself.
        browser.wait_for("#queue", "support-bot")
        browser.wait_for("#queue", "batch")
        browser.wait_for("#headline", "held up by")
        assert "(weir’s configuration)" in browser.text("#headline")
        browser.wait_for("#queue tbody", "the limit of 2 requests at a time for client batch")
        browser.wait_for("#queue tbody", "the limit of 1 request at a time for model deepseek-chat")
        assert "weir’s configuration" in browser.text("#queue tbody")
        browser.wait_for("#models", "deepseek-chat")
        browser.wait_for("#models", "found")
        browser.wait_for("#of-model", "ammm")
        assert "nightly" in browser.text("#clients")
        assert "requests 60/min" in browser.text("#clients"), "as the configuration has it"
        served = status(weir)["totals"]["requests"]["ok"]
        wait_until("more was served", lambda: status(weir)["totals"]["requests"]["ok"] > served + 5)
        tiles = dict(zip(browser.text("#tiles dt").split("\n"), browser.text("#tiles .value").split("\n")))
        assert tiles["Waiting"] != "0 of 10000", tiles
        # A line has two points after ten seconds.
        wait_until("the lines begin", lambda: len(status(weir)["series"]["requests_per_second"]) >= 2)
        wait_until("the charts follow", lambda: "L" in (browser.run("return document.querySelector('.lines .line.a').getAttribute('d')") or ""))
        for scheme in ["light", "dark"]:
            for name, width in [("wide", 1440), ("middle", 800), ("narrow", 360)]:
                browser.look(width, 900, scheme)
                assert_no_sideways_overflow(browser, f"{name}, {scheme}")
                assert browser.is_shown("#who")
                picture(browser, f"load-{name}-{scheme}")
        browser.look(1280, 900)
        # A chart of one model.
        browser.run("const s = document.querySelector('#of-model'); s.value = 'deepseek-chat'; s.dispatchEvent(new Event('change'))")
        browser.wait_for("#charts", "Tokens per second")
        axe(browser)
        browser.find("#pause").click()
        browser.wait_for("#live", "paused")
        assert browser.find("#pause").get_attribute("aria-pressed") == "true"
    assert browser.errors() == []


def axe(browser: Browser) -> None:
    """Deque's checks of what a page is to those who do not see it, or not well; by the driver, so that no policy is in its way."""
    script = (ROOT / "tests/clients/node/node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
    for scheme in ["light", "dark"]:
        browser.look(1280, 900, scheme)
        browser.run(script)
        found = browser.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] })"
            ".then(it => done(it.violations.map(v => [v.id, v.help, v.nodes.map(n => n.html.slice(0, 200) + ' ' + n.failureSummary)])))"
        )
        assert found == [], f"{scheme}: {json.dumps(found, indent=1)}"


def test_a_failing_gateway_is_shown_with_breaker_and_errors(
    gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser
):
    gateway.answers(*[Answer(500, error("no backend")) for _ in range(200)])
    weir = start_weir(gateway, '[retry]\nmax_retries = 0\n[breaker]\ngive_up = "2s"')
    browser.open(f"{weir.admin_url}/status")
    with load(weir, *[("gpt-4.1-mini", "any", False)] * 4):
        browser.wait_for("#notes", "breaker open")
        browser.wait_for("#errors", "breaker")
        for name, width in [("wide", 1440), ("narrow", 360)]:
            browser.look(width, 900, "dark" if name == "narrow" else "light")
            assert_no_sideways_overflow(browser, name)
            picture(browser, f"failing-{name}")
        axe(browser)


def test_a_name_with_markup_in_it_is_shown_as_it_is(gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser):
    gateway.answers(Answer(body=completion()), Answer(400, error(SCRIPT_NAME)))
    weir = start_weir(gateway)
    assert post(weir, SCRIPT_NAME, "any") == 200
    assert post(weir, SCRIPT_NAME, "any") == 400
    browser.open(f"{weir.admin_url}/status")
    browser.wait_for("#models", SCRIPT_NAME)
    browser.wait_for("#of-model", SCRIPT_NAME)
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.driver.title == "weir status"
    # And if it were put in as markup, the policy would not let it run.
    browser.run("document.querySelector('#foot').insertAdjacentHTML('beforeend', arguments[0])", SCRIPT_NAME)
    wait_until("the policy speaks", lambda: any("Content Security Policy" in line for line in browser.errors()))
    assert browser.driver.title == "weir status"


def test_with_a_token_the_page_asks_for_it_and_keeps_it_to_the_tab(
    gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser
):
    weir = start_weir(gateway, '[server]\nadmin_token = "let-me-look"')
    browser.open(f"{weir.admin_url}/status")
    browser.wait_for("#live", "token needed")
    assert browser.is_shown("#login") and not browser.is_shown("#content")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "token"
    picture(browser, "token")
    axe(browser)
    browser.find("#token").send_keys("wrong" + Keys.ENTER)
    wait_until("it is refused", lambda: browser.is_shown("#token-wrong"))
    browser.find("#token").send_keys("let-me-look" + Keys.ENTER)
    browser.wait_for("#live", "live")
    assert browser.is_shown("#content") and "let-me-look" not in browser.driver.current_url
    browser.driver.refresh()
    browser.wait_for("#live", "live")
    assert "let-me-look" not in "\n".join(weir.process.log)
    assert browser.run("return localStorage.length + document.cookie.length") == 0
    browser.find("#forget").click()
    browser.wait_for("#live", "token needed")
    assert browser.run("return sessionStorage.length") == 0 and not browser.is_shown("#content")


def test_when_weir_stops_it_says_so_and_how_old_the_data_is(
    gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser
):
    weir = start_weir(gateway)
    browser.open(f"{weir.admin_url}/status")
    browser.wait_for("#live", "live")
    weir.process.end()
    browser.wait_for("#live", "offline")
    browser.wait_for("#offline", "cannot be reached")
    browser.wait_for("#offline", "What is shown is")
    assert browser.is_shown("#offline") and browser.is_shown("#content")
    picture(browser, "offline")


def test_it_can_be_used_by_the_keyboard_alone(gateway: Gateway, start_weir: Callable[..., Weir], browser: Browser):
    weir = start_weir(gateway)
    browser.open(f"{weir.admin_url}/status")
    browser.wait_for("#live", "live")
    reached = []
    for _ in range(3):
        browser.find("body").send_keys(Keys.TAB) if not reached else browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        focus = browser.driver.switch_to.active_element
        outline = browser.run("const s = getComputedStyle(arguments[0]); return [s.outlineStyle, parseFloat(s.outlineWidth)]", focus)
        assert outline[0] != "none" and outline[1] >= 2, outline
        assert browser.run("const r = arguments[0].getBoundingClientRect(); return r.left >= 0 && r.width > 0", focus)
        reached.append(focus.get_attribute("id") or focus.get_attribute("class"))
    assert reached == ["skip", "pause", "of-model"]


def test_programs_get_the_same(gateway: Gateway, start_weir: Callable[..., Weir]):
    weir = start_weir(gateway)
    told = status(weir)
    assert (told["schema"], told["state"]) == (1, "ready")
    assert {"queue", "models", "clients", "limits", "series", "recent_errors", "rates", "latency"} <= told.keys()
